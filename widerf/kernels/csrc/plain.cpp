// The kernels for any processor: vectors of 16 bytes.
#define WIDERF_VECTOR_BYTES 16
#include "sparse_conv_impl.h"
