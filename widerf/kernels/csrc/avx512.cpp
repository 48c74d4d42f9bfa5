// The kernels for AVX-512F (tested at its own width where the processor has it, and with AVX2's flags elsewhere).
#define WIDERF_VECTOR_BYTES 64
#include "sparse_conv_impl.h"
