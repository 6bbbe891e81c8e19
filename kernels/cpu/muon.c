/* The elementwise halves of a Muon step, of one matrix: see ../muon.py. Gradients, momentum and weights are float32,
   updates are elements. */
#include "common.h"

/* Rows of momentum and update (M, N) are contiguous. */
void muon_momentum(const float *grad, float *momentum, element *update, int64_t grad_stride, int64_t M, int64_t N,
                   double beta, double eps) {
    float new = 1 - beta;
    PARALLEL(M * N)
    for (int64_t m = 0; m < M; m++) {
        const float *g = grad + m * grad_stride;
        float *v = momentum + m * N, squares = 0;
        element *u = update + m * N;
        VECTOR_SUM(squares)
        for (int64_t n = 0; n < N; n++) {
            v[n] += new * (g[n] - v[n]);
            float nesterov = v[n] + new * (g[n] - v[n]);
            squares += nesterov * nesterov;
        }
        float scale = 1 / (sqrtf(squares) + (float)eps);
        VECTOR
        for (int64_t n = 0; n < N; n++) u[n] = rounded(scale * (v[n] + new * (g[n] - v[n])));
    }
}

/* Factors of the rows of the update, or else of its columns. Any strides. */
void muon_apply(float *weight, const element *update, const float *factors, int64_t weight_m, int64_t weight_n,
                int64_t update_m, int64_t update_n, int64_t of_rows, int64_t M, int64_t N, double lr, double decay) {
    float rate = lr, shrink = decay;
    PARALLEL(M * N)
    for (int64_t m = 0; m < M; m++) {
        VECTOR
        for (int64_t n = 0; n < N; n++) {
            float *w = weight + m * weight_m + n * weight_n;
            float step = load(update[m * update_m + n * update_n]) * factors[of_rows ? m : n];
            *w -= rate * (step + (step * *w >= 0 ? shrink * *w : 0));
        }
    }
}
