/* ReLU^2 and its gradient, in place: see ../linear_relu2.py. */
#include "common.h"

void relu2(element *p, int64_t n) {
    PARALLEL(n)
    for (int64_t i = 0; i < n; i++) {
        float x = load(p[i]);
        x = x < 0 ? 0 : x; /* unlike a maximum, keeps NaN */
        p[i] = rounded(x * x);
    }
}

/* da becomes 2 sqrt(a) da. */
void relu2_backward(element *da, const element *a, int64_t n) {
    PARALLEL(n)
    for (int64_t i = 0; i < n; i++) da[i] = rounded(2 * sqrtf(load(a[i])) * load(da[i]));
}
