/* Functions of single elements, with the same result wherever an element lies: see ../batch_invariant.py. */
#include "common.h"

void softcap(const float *x, float *y, int64_t n, double cap) {
    float most = cap, inverse = 1 / most; /* as cross_entropy.c */
    PARALLEL(n)
    for (int64_t i = 0; i < n; i++) y[i] = most * hyperbolic_tangent(x[i] * inverse);
}

void sigmoid(const element *x, element *y, int64_t n) {
    PARALLEL(n)
    for (int64_t i = 0; i < n; i++) y[i] = rounded(1 / (1 + exponential(-load(x[i]))));
}
