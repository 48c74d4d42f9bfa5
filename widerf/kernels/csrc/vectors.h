// Vectors of floats by the compiler's vector extension: one source for every width.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef WIDERF_VECTOR_BYTES
#define WIDERF_VECTOR_BYTES 16
#endif
#define WIDERF_ALWAYS __attribute__((always_inline))
#define WIDERF_INLINE inline WIDERF_ALWAYS

// Before a loop over registers: GCC keeps an array in memory if a loop over it is unrolled late.
#if defined(__clang__)
#define WIDERF_UNROLL _Pragma("clang loop unroll(full)")
#else
#define WIDERF_UNROLL _Pragma("GCC unroll 8")
#endif

namespace {

constexpr int VW = WIDERF_VECTOR_BYTES / 4;  // floats in a vector
constexpr int NV = 2;                        // vectors side by side in a register tile
constexpr int NR = NV * VW;                  // columns of a register tile
constexpr int MR = 6;                        // rows of a register tile: 12 sums, 2 columns and a factor fit 16 registers

typedef float Vec __attribute__((vector_size(WIDERF_VECTOR_BYTES)));
typedef int32_t IVec __attribute__((vector_size(WIDERF_VECTOR_BYTES)));
typedef float LooseVec __attribute__((vector_size(WIDERF_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t LooseIVec __attribute__((vector_size(WIDERF_VECTOR_BYTES), aligned(4), may_alias));

WIDERF_INLINE Vec load(const float *p) { return *(const LooseVec *)p; }
WIDERF_INLINE void store(float *p, Vec v) { *(LooseVec *)p = v; }
WIDERF_INLINE IVec load_mask(const int32_t *p) { return *(const LooseIVec *)p; }
WIDERF_INLINE void store_mask(int32_t *p, IVec v) { *(LooseIVec *)p = v; }

template <class V, class S>
WIDERF_INLINE V splat(S s) {
#if WIDERF_VECTOR_BYTES == 16
  return V{s, s, s, s};
#elif WIDERF_VECTOR_BYTES == 32
  return V{s, s, s, s, s, s, s, s};
#else
  return V{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s};
#endif
}

// v where the mask is all ones, 0 where it is 0, whatever v is: a product with 0 would keep NaN.
WIDERF_INLINE Vec keep(Vec v, IVec mask) { return (Vec)((IVec)v & mask); }

WIDERF_INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < VW; i++) total += v[i];
  return total;
}

WIDERF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
WIDERF_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
WIDERF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
WIDERF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// A division takes as long as twenty products.
WIDERF_INLINE int64_t floor_div(int64_t a, int64_t b) { return b == 1 ? a : a >= 0 ? a / b : -ceil_div(-a, b); }

}  // namespace
