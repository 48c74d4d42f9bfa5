// The kernels for AVX2 and FMA.
#define WIDERF_VECTOR_BYTES 32
#include "sparse_conv_impl.h"
