/* Attention of one new token of each sequence against its ring of keys and values: see ../decode_attention.py.

   B sequences, H query heads, K kv heads, C head dim, S positions of a ring. Each sequence and kv head is computed on
   its own, and its keys in the order of their positions. So a result depends neither on the other sequences nor on
   where in the ring its keys lie. */
#include "common.h"

/* An index below 2 S in a ring of S. A division would take longer than all else that is done for a key. */
static inline int64_t wrapped(int64_t i, int64_t S) { return i < S ? i : i - S; }

/* n keys or values from ring index `first` on. Weights (G, n) of the heads that share them. */
static void scores_of(const float *q, const element *keys, int64_t stride, int64_t first, int64_t n, int64_t S, int64_t G,
                      int64_t C, float *scores, int64_t room) {
    for (int64_t i = 0; i < n; i++) {
        const element *key = keys + wrapped(first + i, S) * stride;
        for (int64_t g = 0; g < G; g++) {
            float score = 0;
            VECTOR_SUM(score)
            for (int64_t c = 0; c < C; c++) score += q[g * C + c] * load(key[c]);
            scores[g * room + i] = score;
        }
    }
}

/* Scores become weights that are not yet divided by their sum, which is returned. */
static float softmax(float *scores, int64_t n, float softcap) {
    int64_t padded = (n + 15) / 16 * 16; /* so that no exponential is left over */
    float largest = -INFINITY, total = 0;
    if (softcap) {
        VECTOR
        for (int64_t i = 0; i < n; i++) scores[i] = softcap * hyperbolic_tangent(scores[i] / softcap);
    }
    for (int64_t i = n; i < padded; i++) scores[i] = -INFINITY;
    PRAGMA(omp simd reduction(max : largest))
    for (int64_t i = 0; i < padded; i++) largest = scores[i] > largest ? scores[i] : largest;
    VECTOR_SUM(total)
    for (int64_t i = 0; i < padded; i++) {
        float weight = exponential(scores[i] - largest);
        scores[i] = i < n ? weight : 0;
        total += scores[i];
    }
    return total;
}

/* q, k, v: strides over batch and heads; the caches: over slots, positions and heads. y (B, H, C): contiguous.
   window, softcap: 0 for none. */
void decode_attention(const element *q, const element *k, const element *v, element *k_cache, element *v_cache,
                      const int64_t *slots, const int64_t *lengths, element *y, const int64_t *q_s,
                      const int64_t *k_s, const int64_t *v_s, const int64_t *kc_s, const int64_t *vc_s, int64_t B,
                      int64_t H, int64_t K, int64_t C, int64_t S, int64_t window, double softcap, double scale) {
    int64_t G = H / K, products = 0;
    for (int64_t b = 0; b < B; b++) products += (window && window < lengths[b] ? window : lengths[b]) * H * C;
    PARALLEL_PRODUCTS(products)
    for (int64_t program = 0; program < B * K; program++) {
        int64_t b = program / K, h = program % K, newest = lengths[b];
        element *keys = k_cache + slots[b] * kc_s[0] + h * kc_s[2], *values = v_cache + slots[b] * vc_s[0] + h * vc_s[2];
        for (int64_t c = 0; c < C; c++) {
            keys[newest % S * kc_s[1] + c] = k[b * k_s[0] + h * k_s[1] + c];
            values[newest % S * vc_s[1] + c] = v[b * v_s[0] + h * v_s[1] + c];
        }
        int64_t first = window && newest - window + 1 > 0 ? newest - window + 1 : 0, n = newest + 1 - first;
        int64_t start = first % S, room = n + 15;
        float *query = malloc(G * (2 * C + room) * sizeof(float)), *sum = query + G * C, *weights = sum + G * C;
        for (int64_t g = 0; g < G; g++) {
            const element *from = q + b * q_s[0] + (h * G + g) * q_s[1];
            for (int64_t c = 0; c < C; c++) {
                query[g * C + c] = (float)scale * load(from[c]);
                sum[g * C + c] = 0;
            }
        }
        scores_of(query, keys, kc_s[1], start, n, S, G, C, weights, room);
        for (int64_t g = 0; g < G; g++) {
            float *weight = weights + g * room, inverse = 1 / softmax(weight, n, softcap), *total = sum + g * C;
            element *out = y + (b * H + h * G + g) * C;
            for (int64_t i = 0; i < n; i++) {
                const element *value = values + wrapped(start + i, S) * vc_s[1];
                VECTOR
                for (int64_t c = 0; c < C; c++) total[c] += weight[i] * load(value[c]);
            }
            for (int64_t c = 0; c < C; c++) out[c] = rounded(inverse * total[c]);
        }
        free(query);
    }
}
