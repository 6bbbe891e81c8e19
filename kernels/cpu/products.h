/* Products with rows of type WEIGHT, which WIDEN turns into PARTS vectors of floats: files include this once for each
   type. NAME: the function of this type. Each product is a sum over the depth in LANES parts, which are then added,
   in an order that depends on nothing but the depth. */
#undef SPAN
#define SPAN (PARTS * LANES)
#define SUMS 24 /* at most, at once */
#define COLUMNS_AT_ONCE 8 /* sums of one row, of which none waits for its last addition */
#define ROWS_AT_ONCE 48 /* that a cache keeps, while the columns are read once */
#if LANES < 16
#define TALL 4 /* rows of a block of four columns: as many sums as there are registers for */
#elif PARTS > 2
#define TALL 2
#elif PARTS > 1
#define TALL 4
#else
#define TALL 6
#endif

/* A row of x (D,) as floats in the order in which w is widened, times scale, and zeros up to a multiple of SPAN. */
INLINE void NAME(widened)(const element *row, float scale, int64_t D, float *out) {
    for (int64_t d = 0; d < D; d += SPAN)
        for (int64_t p = 0; p < PARTS; p++)
            for (int64_t i = 0; i < LANES; i++, out++) {
                int64_t at = d + PARTS * i + p;
                *out = at < D ? scale * load(row[at]) : 0;
            }
}

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

/* The same for R rows and up to COLUMNS_AT_ONCE columns, in blocks, or one by one at the edge. */
static void NAME(products)(const float *x, int64_t depth, const WEIGHT *w, int64_t w_n, int64_t R,
                           int64_t columns, int64_t D, float *y) {
#undef ALL
#define ALL(ROWS, COLUMNS)                                  \
    for (; r + ROWS <= R; r += ROWS)                        \
        for (int64_t n = 0; n + COLUMNS <= columns; n += COLUMNS) \
            NAME(block)(x + r * depth, depth, w + n * w_n, w_n, D, ROWS, COLUMNS, y + r * COLUMNS_AT_ONCE + n);
    int64_t r = 0;
    if (columns == COLUMNS_AT_ONCE) {
        ALL(TALL, 4)
        ALL(4, 2)
        ALL(2, 4)
        ALL(1, 8)
    }
    ALL(1, 1)
}
