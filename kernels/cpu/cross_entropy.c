/* Cross-entropy of rows of logits, and its gradient in place: see ../cross_entropy.py. The logarithms of their softmax,
   in which the same sums are added in the same order: see ../batch_invariant.py. */
#include "common.h"

/* log(sum(e^x)) of n numbers. weights: e^(x - the largest), whose sum is total. A function of its own, so that it is
   compiled once. */
static __attribute__((noinline)) float log_sum_exp(const float *x, int64_t n, float *weights, float *total) {
    float largest = -INFINITY, sum = 0;
    PRAGMA(omp simd reduction(max : largest))
    for (int64_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    VECTOR_SUM(sum)
    for (int64_t i = 0; i < n; i++) {
        float weight = exponential(x[i] - largest);
        weights[i] = weight;
        sum += weight;
    }
    *total = sum;
    return largest + logf(sum);
}

/* x (M, V), contiguous, becomes the logarithm of the softmax of its rows. */
void log_softmax(float *x, int64_t M, int64_t V) {
    PRAGMA(omp parallel if (M * V > 16384))
    {
        float *weights = malloc(V * sizeof(float)), total;
        PRAGMA(omp for schedule(static))
        for (int64_t m = 0; m < M; m++) {
            float *row = x + m * V, lse = log_sum_exp(row, V, weights, &total);
            VECTOR
            for (int64_t n = 0; n < V; n++) row[n] -= lse;
        }
        free(weights);
    }
}

/* logits: (M, V) contiguous; overwritten with their gradient if dlosses (M,) is given. losses: (M,). */
void cross_entropy(element *logits, const int64_t *targets, const float *dlosses, float *losses, int64_t M, int64_t V,
                   double softcap, double z_loss, int64_t ignore) {
    float cap = softcap, inverse = softcap ? 1 / softcap : 0, z = z_loss;
    PRAGMA(omp parallel if (M * V > 16384))
    {
        float *capped = malloc(2 * V * sizeof(float)), *weights = capped + V;
        PRAGMA(omp for schedule(static))
        for (int64_t m = 0; m < M; m++) {
            element *row = logits + m * V;
            int64_t target = targets[m];
            if (target == ignore) {
                losses[m] = 0;
                if (dlosses)
                    for (int64_t n = 0; n < V; n++) row[n] = rounded(0);
                continue;
            }
            float total;
            VECTOR
            for (int64_t n = 0; n < V; n++) capped[n] = load(row[n]);
            if (cap) {
                VECTOR
                for (int64_t n = 0; n < V; n++) capped[n] = cap * hyperbolic_tangent(capped[n] * inverse);
            }
            float lse = log_sum_exp(capped, V, weights, &total);
            int known = target >= 0 && target < V; /* else NaN, so that it cannot go unnoticed */
            float chosen = known ? capped[target] : NAN;
            losses[m] = lse - chosen + z * lse * lse;
            if (!dlosses) continue;
            float scale = dlosses[m] * (1 + 2 * z * lse) / total;
            VECTOR
            for (int64_t n = 0; n < V; n++) {
                float t = capped[n] * inverse, slope = cap ? 1 - t * t : 1; /* without a cap, t may be 0 * inf */
                row[n] = rounded(scale * weights[n] * slope);
            }
            float t = chosen * inverse, slope = cap ? 1 - t * t : 1;
            row[known ? target : 0] = known ? rounded((scale * weights[target] - dlosses[m]) * slope) : rounded(NAN);
        }
        free(capped);
    }
}
