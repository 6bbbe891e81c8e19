/* RMSNorm of rows of x, or of the rounded sum a x + b residual: see ../rms_norm.py. */
#include "common.h"

/* total: where the sum goes; it has the rows of y. Without a residual: NULL. a, b: NULL for 1. */
void rms_norm(const element *x, const element *residual, const float *a, const float *b, element *y,
              element *total, float *rstd, int64_t x_stride, int64_t residual_stride, int64_t M, int64_t N, double eps) {
    float of_x = a ? *a : 1, of_residual = b ? *b : 1;
    PARALLEL(M * N)
    for (int64_t m = 0; m < M; m++) {
        const element *row = x + m * x_stride;
        element *out = y + m * N;
        if (residual) {
            const element *added = residual + m * residual_stride;
            element *sum = total + m * N;
            VECTOR
            for (int64_t n = 0; n < N; n++) sum[n] = rounded(of_x * load(row[n]) + of_residual * load(added[n]));
            row = sum;
        }
        float squares = 0;
        VECTOR_SUM(squares)
        for (int64_t n = 0; n < N; n++) squares += load(row[n]) * load(row[n]);
        float r = 1 / sqrtf(squares / N + (float)eps);
        rstd[m] = r;
        VECTOR
        for (int64_t n = 0; n < N; n++) out[n] = rounded(r * load(row[n]));
    }
}

/* With scales a and b, what was normalised is a x + b residual, rounded, and dresidual and dscales (M, 2), each row's
   share of the gradients of a and b, are written. Without, it is x, and these are NULL. dtotal: the gradient of its
   other uses, or NULL. */
void rms_norm_backward(const element *dy, const element *dtotal, const element *x, const float *rstd,
                       const element *residual, const float *a, const float *b, element *dx, element *dresidual,
                       float *dscales, int64_t dy_stride, int64_t dtotal_stride, int64_t x_stride,
                       int64_t residual_stride, int64_t M, int64_t N) {
    float of_x = a ? *a : 1, of_residual = b ? *b : 1;
    PARALLEL(M * N)
    for (int64_t m = 0; m < M; m++) {
        const element *g = dy + m * dy_stride, *row = x + m * x_stride, *added = residual + m * residual_stride;
        const element *other = dtotal ? dtotal + m * dtotal_stride : NULL;
        element *out = dx + m * N;
        float r = rstd[m], dot = 0;
        if (!a) {
            VECTOR_SUM(dot)
            for (int64_t n = 0; n < N; n++) dot += load(g[n]) * load(row[n]);
            float share = dot * r * r / N; /* r mean(g n), for the normalised n */
            VECTOR
            for (int64_t n = 0; n < N; n++)
                out[n] = rounded(r * (load(g[n]) - share * load(row[n])) + (other ? load(other[n]) : 0));
            continue;
        }
#define TOTAL(n) load(rounded(of_x * load(row[n]) + of_residual * load(added[n])))
        VECTOR_SUM(dot)
        for (int64_t n = 0; n < N; n++) dot += load(g[n]) * TOTAL(n);
        float share = dot * r * r / N, da = 0, db = 0;
        element *second = dresidual + m * N;
        VECTOR_SUM(da, db)
        for (int64_t n = 0; n < N; n++) {
            float d = r * (load(g[n]) - share * TOTAL(n)) + (other ? load(other[n]) : 0);
            da += d * load(row[n]);
            db += d * load(added[n]);
            out[n] = rounded(of_x * d);
            second[n] = rounded(of_residual * d);
        }
#undef TOTAL
        dscales[2 * m] = da;
        dscales[2 * m + 1] = db;
    }
}
