/* Attention that adds the keys of each query from the first to the last, for any number of queries: see
   ../attention_in_order.py.

   B sequences, T queries of each, H query heads, K kv heads, G that share keys, C head dim. Keys and values are rings
   of S positions: position p lies at index p % S. A block of queries computes its scores together, then its sums. */
#include "lanes.h"

#define WEIGHT element
#define WIDEN widen
#define PARTS ELEMENT_PARTS
#define NAME(function) function
#include "products.h"

#define QUERIES 16 /* of a block, each with its G heads */
#define SUMMED 8 /* rows whose sums are added to at once */

/* LANES elements as floats, in their order. */
INLINE lanes in_order(const element *x) {
#ifdef BFLOAT16
    typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    return (lanes)(__builtin_convertvector(*(const halves *)x, words) << 16);
#else
    return floats(x);
#endif
}

/* n scores become weights that are not yet divided by their sum, whose reciprocal is returned; 0 for no scores. Up to
   LANES - 1 scores behind them become 0. */
static float softmax(float *scores, int64_t n, float softcap) {
    int64_t padded = (n + LANES - 1) / LANES * LANES;
    float largest = -INFINITY, sum;
    lanes total = {0};
    if (softcap) {
        VECTOR
        for (int64_t i = 0; i < n; i++) scores[i] = softcap * hyperbolic_tangent(scores[i] / softcap);
    }
    for (int64_t i = n; i < padded; i++) scores[i] = -INFINITY;
    PRAGMA(omp simd reduction(max : largest))
    for (int64_t i = 0; i < padded; i++) largest = scores[i] > largest ? scores[i] : largest;
    VECTOR
    for (int64_t i = 0; i < padded; i++) scores[i] = exponential(scores[i] - largest);
    for (int64_t i = n; i < padded; i++) scores[i] = 0;
    for (int64_t i = 0; i < padded; i += LANES) total += floats(scores + i);
    add_lanes(&total, 1, &sum);
    return n ? 1 / sum : 0;
}

/* y (ROWS, C) += weights (ROWS, n), `room` apart, times n values, `stride` apart. */
INLINE void add_values(const float *weights, int64_t room, const element *values, int64_t stride, int64_t n, int64_t C,
                       const int ROWS, float *y) {
    for (int64_t c = 0; c < C; c += LANES) {
        int64_t width = C - c < LANES ? C - c : LANES;
        lanes sums[SUMMED];
        UNROLL for (int r = 0; r < ROWS; r++) {
            sums[r] = (lanes){0};
            memcpy(sums + r, y + r * C + c, width * sizeof(float));
        }
        for (int64_t i = 0; i < n; i++) {
            element end[LANES] = {0};
            const element *value = values + i * stride + c;
            if (width < LANES) value = memcpy(end, value, width * sizeof(element));
            lanes right = in_order(value);
            UNROLL for (int r = 0; r < ROWS; r++)
                sums[r] = multiply_add((lanes){0} + weights[r * room + i], right, sums[r]);
        }
        UNROLL for (int r = 0; r < ROWS; r++) memcpy(y + r * C + c, sums + r, width * sizeof(float));
    }
}

/* Query t of sequence b is at position lengths[b] + t, and sees the keys from document_start[b, t] and from
   window - 1 before it on. q, k, v: strides over sequences, positions and heads; y (B, T, H, C): contiguous. slots,
   lengths: NULL for 0, 1, 2... and for 0; document_start (B, T): NULL for 0; window, softcap: 0 for none. */
void attention_in_order(const element *q, const element *k, const element *v, const int64_t *slots,
                        const int64_t *lengths, const int64_t *document_start, element *y, const int64_t *q_s,
                        const int64_t *k_s, const int64_t *v_s, int64_t B, int64_t T, int64_t H, int64_t K, int64_t C,
                        int64_t S, int64_t window, double softcap, double scale) {
    int64_t G = H / K, blocks = (T + QUERIES - 1) / QUERIES, multiplications = 0;
    int64_t depth = (C + SPAN - 1) / SPAN * SPAN;
    for (int64_t b = 0; b < B; b++) {
        int64_t most = T + (lengths ? lengths[b] : 0);
        multiplications += T * (window && window < most ? window : most) * H * C;
    }
    PARALLEL_PRODUCTS(multiplications)
    for (int64_t program = 0; program < B * K * blocks; program++) {
        int64_t b = program / blocks / K, h = program / blocks % K, t = program % blocks * QUERIES;
        int64_t queries = T - t < QUERIES ? T - t : QUERIES, R = queries * G;
        int64_t position = (lengths ? lengths[b] : 0) + t, end = position + queries;
        int64_t from[QUERIES], first = end;
        for (int64_t i = 0; i < queries; i++) {
            from[i] = window && position + i >= window ? position + i - window + 1 : 0;
            int64_t start = document_start ? document_start[b * T + t + i] : 0;
            from[i] = start > from[i] ? start : from[i];
            from[i] = from[i] < position + i + 1 ? from[i] : position + i + 1;
            first = from[i] < first ? from[i] : first;
        }
        const element *keys = k + (slots ? slots[b] : b) * k_s[0] + h * k_s[2];
        const element *values = v + (slots ? slots[b] : b) * v_s[0] + h * v_s[2];
        int64_t n = end - first, room = n + LANES, start = first % S, straight = n < S - start ? n : S - start;
        float *left = malloc(R * (depth + C + room + 1) * sizeof(float)); /* of all of these, R rows */
        float *sums = left + R * depth, *weights = sums + R * C, *inverse = weights + R * room;
        for (int64_t r = 0; r < R; r++) /* row r: query r / G of head r % G */
            widened(q + b * q_s[0] + (t + r / G) * q_s[1] + (h * G + r % G) * q_s[2], scale, C, left + r * depth);
        for (int64_t i = 0, columns; i < n; i += columns) {
            int64_t index = i < straight ? start + i : i - straight, stop = i < straight ? straight : n;
            columns = stop - i < COLUMNS_AT_ONCE ? stop - i : COLUMNS_AT_ONCE;
            for (int64_t r = 0; r < R; r += ROWS_AT_ONCE) {
                float out[ROWS_AT_ONCE * COLUMNS_AT_ONCE];
                int64_t rows = R - r < ROWS_AT_ONCE ? R - r : ROWS_AT_ONCE;
                products(left + r * depth, depth, keys + index * k_s[1], k_s[1], rows, columns, C, out);
                for (int64_t j = 0; j < rows; j++)
                    memcpy(weights + (r + j) * room + i, out + j * COLUMNS_AT_ONCE, columns * sizeof(float));
            }
        }
        for (int64_t r = 0; r < R; r++) {
            int64_t before = from[r / G] - first, seen = position + r / G + 1 - from[r / G];
            float *row = weights + r * room;
            inverse[r] = softmax(row + before, seen, softcap);
            for (int64_t i = 0; i < before; i++) row[i] = 0;
            for (int64_t i = before + seen; i < n; i++) row[i] = 0;
        }
        for (int64_t i = 0; i < R * C; i++) sums[i] = 0;
        for (int64_t part = 0; part < 2; part++) { /* up to the end of the ring, and from its beginning on */
            const element *part_values = values + (part ? 0 : start * v_s[1]);
            int64_t skipped = part ? straight : 0, count = part ? n - straight : straight, r = 0;
            for (; r + SUMMED <= R; r += SUMMED)
                add_values(weights + r * room + skipped, room, part_values, v_s[1], count, C, SUMMED, sums + r * C);
            for (; r < R; r++)
                add_values(weights + r * room + skipped, room, part_values, v_s[1], count, C, 1, sums + r * C);
        }
        for (int64_t r = 0; r < R; r++) {
            element *out = y + ((b * T + t + r / G) * H + h * G + r % G) * C;
            for (int64_t c = 0; c < C; c++) out[c] = rounded(inverse[r] * sums[r * C + c]);
        }
        free(left);
    }
}
