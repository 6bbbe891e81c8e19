/* The kernel of decode_linear.c, which includes this once for each type of weights: see products.h. */
#include "products.h"

/* y (R, N) of x (R, D), all contiguous but for rows of w, which are w_n apart. scales (N,): of the rows of w. With
   scales a and b: of total = a x + b x0, which is written. norm: of the normalised row, and with a gate (K, G) also
   gates (R, K). residual (R, N): added. What is not asked for is NULL. */
void NAME(decode_linear)(const element *x, const element *a, const element *b, const element *x0, const WEIGHT *w,
                         const float *scales, const element *gate, const element *residual, element *y,
                         element *total, element *gates, int64_t w_n, int64_t R, int64_t N, int64_t D, int64_t K,
                         int64_t G, int64_t norm, int64_t squared_relu, double eps) {
    int64_t depth = (D + SPAN - 1) / SPAN * SPAN;
    float *left = malloc(R * depth * sizeof(float)); /* rows of x, in the order in which w is widened */
    PARALLEL_PRODUCTS(R * D)
    for (int64_t r = 0; r < R; r++) {
        const element *row = x + r * D;
        float squares = 0, scale = 1;
        if (x0) {
            float of_x = load(*a), of_x0 = load(*b);
            element *sum = total + r * D;
            VECTOR
            for (int64_t d = 0; d < D; d++) sum[d] = rounded(of_x * load(row[d]) + of_x0 * load(x0[r * D + d]));
            row = sum;
        }
        if (norm) {
            VECTOR_SUM(squares)
            for (int64_t d = 0; d < D; d++) squares += load(row[d]) * load(row[d]);
            scale = 1 / sqrtf(squares / D + (float)eps);
        }
        NAME(widened)(row, scale, D, left + r * depth);
        for (int64_t k = 0; gate && k < K; k++) {
            float sum = 0;
            VECTOR_SUM(sum)
            for (int64_t g = 0; g < G; g++) sum += scale * load(row[g]) * load(gate[k * G + g]);
            gates[r * K + k] = rounded(sum);
        }
    }
    int64_t groups = (N + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE, blocks = (R + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    PARALLEL_PRODUCTS(R * N * D)
    for (int64_t i = 0; i < blocks * groups; i++) {
        int64_t first = i / groups * ROWS_AT_ONCE, rows = R - first < ROWS_AT_ONCE ? R - first : ROWS_AT_ONCE;
        int64_t start = i % groups * COLUMNS_AT_ONCE, columns = N - start < COLUMNS_AT_ONCE ? N - start : COLUMNS_AT_ONCE;
        float out[ROWS_AT_ONCE * COLUMNS_AT_ONCE];
        NAME(products)(left + first * depth, depth, w + start * w_n, w_n, rows, columns, D, out);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t n = 0; n < columns; n++) {
                float value = out[r * COLUMNS_AT_ONCE + n] * (scales ? scales[start + n] : 1);
                int64_t at = (first + r) * N + start + n;
                if (squared_relu) value = value < 0 ? 0 : value * value; /* keeps NaN */
                y[at] = rounded(residual ? load(residual[at]) + value : value);
            }
    }
    free(left);
}
