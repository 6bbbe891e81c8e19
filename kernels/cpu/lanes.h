/* Vectors of floats of the width that this CPU has, for sums whose order of additions must not be the compiler's
   choice. */
#include <string.h>

#include "common.h"

#define LANES (__BIGGEST_ALIGNMENT__ / 4)
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t words __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16), may_alias));
typedef float unaligned_lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t unaligned_words __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL PRAGMA(GCC unroll 32)

/* a b + c: one instruction where there is one. */
INLINE lanes multiply_add(lanes a, lanes b, lanes c) {
#ifdef __FP_FAST_FMAF
    for (int i = 0; i < LANES; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE lanes floats(const float *x) { return *(const unaligned_lanes *)x; }

/* The sums of the lanes of each of `count` vectors, in an order that is written here. A function of its own:
   inlined, gcc takes apart the vectors that were added last. */
static __attribute__((noinline)) void add_lanes(const lanes *x, int64_t count, float *sums) {
    for (int64_t i = 0; i < count; i++) {
        const quad *parts = (const quad *)(x + i);
        quad sum = parts[0];
        UNROLL for (int j = 1; j < LANES / 4; j++) sum += parts[j];
        sums[i] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    }
}

/* Numbers in memory become PARTS vectors of floats, in an order that costs least: lane i of part p is number
   PARTS * i + p, of which the first lies in the lowest bits. */
#ifdef BFLOAT16
#define ELEMENT_PARTS 2
INLINE void widen(const element *x, lanes *parts) {
    words pairs = *(const unaligned_words *)x;
    parts[0] = (lanes)(pairs << 16);
    parts[1] = (lanes)(pairs & (int32_t)0xffff0000);
}
#else
#define ELEMENT_PARTS 1
INLINE void widen(const element *x, lanes *parts) { parts[0] = floats(x); }
#endif

#define INT8_PARTS 4
INLINE void widen_int8(const int8_t *x, lanes *parts) {
    words four = *(const unaligned_words *)x;
    UNROLL for (int p = 0; p < INT8_PARTS; p++)
        parts[p] = __builtin_convertvector(four << (24 - 8 * p) >> 24, lanes);
}
