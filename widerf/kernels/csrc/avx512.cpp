// The kernels for AVX-512F (compiled and, with AVX2 flags, tested; never run on AVX-512).
#define WIDERF_VECTOR_BYTES 64
#include "sparse_conv_impl.h"
