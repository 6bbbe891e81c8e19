/* For weights of type WEIGHT, which WIDEN turns into PARTS vectors of floats: decode_linear.c includes this once for
   each type. NAME: the function of this type. */
#undef SPAN
#define SPAN (PARTS * LANES)
#define SUMS 8 /* at once: none waits for its last addition */
#define MOST_ROWS 16 /* as ../decode_linear.py */
#define COLUMNS_AT_ONCE SUMS

/* Add the products of one span of ROWS rows of x, `depth` apart, and COLUMNS rows of w, w_n apart. */
INLINE void NAME(add_span)(lanes *sums, const float *x, int64_t depth, const WEIGHT *w, int64_t w_n,
                           const int ROWS, const int COLUMNS) {
    lanes right[SUMS][PARTS];
    UNROLL for (int n = 0; n < COLUMNS; n++) WIDEN(w + n * w_n, right[n]);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int p = 0; p < PARTS; p++) {
            lanes left = floats(x + r * depth + p * LANES);
            UNROLL for (int n = 0; n < COLUMNS; n++)
                sums[r * COLUMNS + n] = multiply_add(left, right[n][p], sums[r * COLUMNS + n]);
        }
}

/* Products of ROWS rows of x and COLUMNS rows of w (N, D), into y, whose rows are COLUMNS_AT_ONCE apart. */
INLINE void NAME(block)(const float *x, int64_t depth, const WEIGHT *w, int64_t w_n, int64_t D,
                        const int ROWS, const int COLUMNS, float *y) {
    lanes sums[SUMS], stored[SUMS];
    WEIGHT end[SUMS][SPAN];
    float added[SUMS];
    UNROLL for (int i = 0; i < ROWS * COLUMNS; i++) sums[i] = (lanes){0};
    for (int64_t d = 0; d < D; d += SPAN) {
        const WEIGHT *from = w + d;
        if (d + SPAN > D) { /* the last elements of the rows, and zeros */
            memset(end, 0, sizeof end);
            for (int n = 0; n < COLUMNS; n++) memcpy(end[n], from + n * w_n, (D - d) * sizeof(WEIGHT));
            from = end[0];
            w_n = SPAN;
        }
        NAME(add_span)(sums, x + d, depth, from, w_n, ROWS, COLUMNS);
    }
    UNROLL for (int i = 0; i < ROWS * COLUMNS; i++) stored[i] = sums[i];
    add_lanes(stored, ROWS * COLUMNS, added);
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < COLUMNS; n++) y[r * COLUMNS_AT_ONCE + n] = added[r * COLUMNS + n];
}

/* The same for R rows and up to COLUMNS_AT_ONCE columns, in blocks of SUMS products, or one by one at the edge. */
static void NAME(products)(const float *x, int64_t depth, const WEIGHT *w, int64_t w_n, int64_t R,
                           int64_t columns, int64_t D, float *y) {
#undef ALL
#define ALL(ROWS, COLUMNS)                                  \
    for (; r + ROWS <= R; r += ROWS)                        \
        for (int64_t n = 0; n + COLUMNS <= columns; n += COLUMNS) \
            NAME(block)(x + r * depth, depth, w + n * w_n, w_n, D, ROWS, COLUMNS, y + r * COLUMNS_AT_ONCE + n);
    int64_t r = 0;
    if (columns == COLUMNS_AT_ONCE) {
        ALL(4, SUMS / 4)
        ALL(2, SUMS / 2)
        ALL(1, SUMS)
    }
    ALL(1, 1)
}

/* y (R, N) of x (R, D), all contiguous but for rows of w, which are w_n apart. scales (N,): of the rows of w. With
   scales a and b: of total = a x + b x0, which is written. norm: of the normalised row, and with a gate (K, G) also
   gates (R, K). residual (R, N): added. What is not asked for is NULL. */
void NAME(decode_linear)(const element *x, const element *a, const element *b, const element *x0, const WEIGHT *w,
                         const float *scales, const element *gate, const element *residual, element *y,
                         element *total, element *gates, int64_t w_n, int64_t R, int64_t N, int64_t D, int64_t K,
                         int64_t G, int64_t norm, int64_t squared_relu, double eps) {
    int64_t depth = (D + SPAN - 1) / SPAN * SPAN;
    float *left = malloc(R * depth * sizeof(float)); /* rows of x, in the order in which w is widened */
    for (int64_t r = 0; r < R; r++) {
        const element *row = x + r * D;
        float *out = left + r * depth, squares = 0, scale = 1;
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
        for (int64_t d = 0; d < depth; d += SPAN)
            for (int64_t p = 0; p < PARTS; p++)
                for (int64_t i = 0; i < LANES; i++, out++) {
                    int64_t at = d + PARTS * i + p;
                    *out = at < D ? scale * load(row[at]) : 0;
                }
        for (int64_t k = 0; gate && k < K; k++) {
            float sum = 0;
            VECTOR_SUM(sum)
            for (int64_t g = 0; g < G; g++) sum += scale * load(row[g]) * load(gate[k * G + g]);
            gates[r * K + k] = rounded(sum);
        }
    }
    PARALLEL_PRODUCTS(R * N * D)
    for (int64_t start = 0; start < N; start += COLUMNS_AT_ONCE) {
        int64_t columns = N - start < COLUMNS_AT_ONCE ? N - start : COLUMNS_AT_ONCE;
        float out[MOST_ROWS * COLUMNS_AT_ONCE];
        NAME(products)(left, depth, w + start * w_n, w_n, R, columns, D, out);
        for (int64_t r = 0; r < R; r++)
            for (int64_t n = 0; n < columns; n++) {
                float value = out[r * COLUMNS_AT_ONCE + n] * (scales ? scales[start + n] : 1);
                int64_t at = r * N + start + n;
                if (squared_relu) value = value < 0 ? 0 : value * value; /* keeps NaN */
                y[at] = rounded(residual ? load(residual[at]) + value : value);
            }
    }
    free(left);
}
