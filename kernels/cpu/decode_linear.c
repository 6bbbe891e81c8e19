/* Products of a few rows with a large weight, and what is fused with them: see ../decode_linear.py.

   Each result is a sum over the depth in LANES parts, which are then added, in an order that depends on nothing
   else. So it is the same to the last bit for any number of rows, in any order, on any number of threads. */
#include "lanes.h"

#define WEIGHT element
#define WIDEN widen
#define PARTS ELEMENT_PARTS
#define NAME(function) function
#include "decode_linear.h"

#undef WEIGHT
#undef WIDEN
#undef PARTS
#undef NAME
#define WEIGHT int8_t
#define WIDEN widen_int8
#define PARTS INT8_PARTS
#define NAME(function) function##_int8
#include "decode_linear.h"
