/* What the kernels for CPUs share: elements, exponentials, loops.

   Each file is compiled once for float32, and once with -DBFLOAT16. Arithmetic is in float32, rounded once. NaN and
   infinity keep their meaning, so no -ffast-math. Sizes and strides are int64_t, counted in elements, and numbers
   are double: that is how library.py passes them. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define PRAGMA(text) _Pragma(#text)
/* The loop below on all of torch's threads, if it touches enough elements to pay for waking them. */
#define PARALLEL(elements) PRAGMA(omp parallel for schedule(static) if ((elements) > 16384))
/* The same for multiplications, of which a vector does many at once. */
#define PARALLEL_PRODUCTS(count) PRAGMA(omp parallel for schedule(static) if ((count) > 1 << 20))
#define VECTOR PRAGMA(omp simd)
#define VECTOR_SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))

typedef union { float value; uint32_t bits; } Float;

#ifdef BFLOAT16
typedef uint16_t element; /* the upper half of a float */

static inline float load(element x) {
    return (Float){.bits = (uint32_t)x << 16}.value;
}

static inline element rounded(float x) { /* to the nearest, ties to even */
    uint32_t bits = (Float){.value = x}.bits;
    bits = x != x ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
    return bits >> 16;
}
#else
typedef float element;

static inline float load(element x) { return x; }
static inline element rounded(float x) { return x; }
#endif

/* e^x with a relative error of 2e-7; e^-87 below that, e^88 above that. */
static inline float exponential(float x) {
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    float shifted = x * 1.44269504f + 12582912; /* 1.5 * 2^23: the sum's last bits are the nearest integer */
    float n = shifted - 12582912;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n ln 2, with ln 2 in two parts */
    float power = 1 + r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r / 720)))));
    uint32_t scale = ((Float){.value = shifted}.bits + 127) << 23; /* 2^n */
    return power * (Float){.bits = scale}.value;
}

/* With a relative error of 3e-7: as ../tanh.py. */
static inline float hyperbolic_tangent(float x) {
    float s = x * x, magnitude = x < 0 ? -x : x;
    float small = -0.053783830f + s * (0.020795972f + s * -0.0058951584f);
    small = x + x * s * (-0.33333298f + s * (0.13331924f + s * small));
    float large = 1 - 2 / (exponential(2 * magnitude) + 1);
    return magnitude < 0.6f ? small : x < 0 ? -large : large;
}
