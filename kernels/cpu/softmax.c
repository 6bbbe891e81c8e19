/* The softmax of attention over a block of keys, and its gradient, in place: see ../attention_blockwise.py. */
#include "common.h"

/* Scores (B K, G M, N) become scale times themselves, then weights. Row m of a head is a query at position
   position + m; it sees the keys from max(document_start[b, m], position + m - window + 1) to its own position, where
   key n of the block is at position first + n. What a query does not see gets the weight 0. document_start: NULL
   for none, with a stride over the batch. window: 0 for none. */
void masked_softmax(element *scores, const int32_t *document_start, int64_t document_stride, int64_t B, int64_t K,
                    int64_t G, int64_t M, int64_t N, int64_t position, int64_t first, int64_t window, double scale) {
    float factor = scale;
    PRAGMA(omp parallel if (B * K * G * M * N > 16384))
    {
        float *weights = malloc((N + 16) * sizeof(float));
        PRAGMA(omp for schedule(static))
        for (int64_t i = 0; i < B * K * G * M; i++) {
            element *row = scores + i * N;
            int64_t m = i % M, own = position + m - first; /* the query's own key */
            int64_t from = window && own - window + 1 > 0 ? own - window + 1 : 0;
            if (document_start) {
                int64_t start = document_start[i / (K * G * M) * document_stride + m] - first;
                from = start > from ? start : from;
            }
            int64_t to = own + 1 < N ? own + 1 : N;
            to = to > 0 ? to : 0;
            from = from < to ? from : to;
            int64_t seen = to - from, padded = (seen + 15) / 16 * 16; /* so that no exponential is left over */
            float largest = -INFINITY, total = 0;
            VECTOR
            for (int64_t n = 0; n < seen; n++) weights[n] = factor * load(row[from + n]);
            for (int64_t n = seen; n < padded; n++) weights[n] = -INFINITY;
            PRAGMA(omp simd reduction(max : largest))
            for (int64_t n = 0; n < padded; n++) largest = weights[n] > largest ? weights[n] : largest;
            VECTOR_SUM(total)
            for (int64_t n = 0; n < padded; n++) {
                float weight = exponential(weights[n] - largest);
                weights[n] = weight;
                total += weight;
            }
            float inverse = 1 / total;
            for (int64_t n = 0; n < from; n++) row[n] = 0;
            VECTOR
            for (int64_t n = 0; n < seen; n++) row[from + n] = rounded(inverse * weights[n]);
            for (int64_t n = to; n < N; n++) row[n] = 0;
        }
        free(weights);
    }
}

/* dweights (rows, N) become the gradient of the scores. */
void softmax_backward(element *dweights, const element *weights, int64_t rows, int64_t N, double scale) {
    PARALLEL(rows * N)
    for (int64_t i = 0; i < rows; i++) {
        element *d = dweights + i * N;
        const element *w = weights + i * N;
        float dot = 0, factor = scale;
        VECTOR_SUM(dot)
        for (int64_t n = 0; n < N; n++) dot += load(w[n]) * load(d[n]);
        VECTOR
        for (int64_t n = 0; n < N; n++) d[n] = rounded(factor * load(w[n]) * (load(d[n]) - dot));
    }
}
