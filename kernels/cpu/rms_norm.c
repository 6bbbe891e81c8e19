/* RMSNorm of rows of x, or of the rounded sum a x + b residual: see ../rms_norm.py. */
#include "common.h"

/* total: where the sum goes; it has the rows of y. residual, a and b, weight: NULL where there is none. */
void rms_norm(const element *x, const element *residual, const float *a, const float *b, const float *weight,
              element *y, element *total, float *rstd, int64_t x_stride, int64_t residual_stride, int64_t M, int64_t N,
              double eps) {
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
        for (int64_t n = 0; n < N; n++) out[n] = rounded(r * load(row[n]) * (weight ? weight[n] : 1));
    }
}

/* One row of the backward pass. Inlined, so that what is NULL at a call costs nothing in its loops. */
static inline __attribute__((always_inline)) void row_backward(
    const element *dy, const element *dtotal, const element *x, const element *residual, const float *weight,
    element *dx, element *dresidual, float *dscales, float *dweight, float a, float b, float r, int64_t N) {
#define GRADIENT(n) (weight ? load(dy[n]) * weight[n] : load(dy[n])) 
#define NORMALISED(n) (r * (residual ? load(rounded(a * load(x[n]) + b * load(residual[n]))) : load(x[n])))
    float dot = 0;
    double da = 0, db = 0; /* of both signs, so that much cancels */
    VECTOR_SUM(dot)
    for (int64_t n = 0; n < N; n++) dot += GRADIENT(n) * NORMALISED(n);
    float mean = dot / N;
    VECTOR_SUM(da, db)
    for (int64_t n = 0; n < N; n++) {
        float d = r * (GRADIENT(n) - mean * NORMALISED(n)) + (dtotal ? load(dtotal[n]) : 0);
        if (weight) dweight[n] += load(dy[n]) * NORMALISED(n);
        if (residual) {
            da += (double)d * load(x[n]);
            db += (double)d * load(residual[n]);
            dresidual[n] = rounded(b * d);
        }
        dx[n] = rounded(a * d);
    }
    if (residual) {
        dscales[0] = da;
        dscales[1] = db;
    }
}

/* What was normalised is x, or with scales a and b the rounded a x + b residual. dtotal: the gradient of its other
   uses. Written with scales: dresidual and dscales (M, 2), each row's share of the gradients of a and b. With a
   weight: dweights (blocks, N), the shares of each block of `rows` rows, zero before. All of these may be NULL. */
void rms_norm_backward(const element *dy, const element *dtotal, const element *x, const float *rstd,
                       const element *residual, const float *a, const float *b, const float *weight, element *dx,
                       element *dresidual, float *dscales, float *dweights, int64_t rows, int64_t dy_stride,
                       int64_t dtotal_stride, int64_t x_stride, int64_t residual_stride, int64_t M, int64_t N) {
    float of_x = a ? *a : 1, of_residual = b ? *b : 1;
    PARALLEL(M * N)
    for (int64_t block = 0; block < (M + rows - 1) / rows; block++) {
        int64_t end = (block + 1) * rows < M ? (block + 1) * rows : M;
        for (int64_t m = block * rows; m < end; m++) {
            const element *g = dy + m * dy_stride, *row = x + m * x_stride, *added = residual + m * residual_stride;
            const element *other = dtotal ? dtotal + m * dtotal_stride : NULL;
            element *out = dx + m * N, *second = dresidual + m * N;
            float r = rstd[m], *scales = dscales + 2 * m, *sums = dweights + block * N;
            if (a && weight)
                row_backward(g, other, row, added, weight, out, second, scales, sums, of_x, of_residual, r, N);
            else if (a)
                row_backward(g, other, row, added, NULL, out, second, scales, NULL, of_x, of_residual, r, N);
            else if (weight)
                row_backward(g, other, row, NULL, weight, out, NULL, NULL, sums, 1, 0, r, N);
            else if (other)
                row_backward(g, other, row, NULL, NULL, out, NULL, NULL, NULL, 1, 0, r, N);
            else
                row_backward(g, NULL, row, NULL, NULL, out, NULL, NULL, NULL, 1, 0, r, N);
        }
    }
}
