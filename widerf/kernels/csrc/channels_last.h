// channels_last: a few samples at a time are transposed to planes, computed, and transposed back.
#pragma once
#include "parallel.h"

namespace {

constexpr int64_t SLAB_FLOATS = 1 << 18;  // of the larger image: what the last cache holds easily
constexpr int64_t SIDE = 16;              // a cache line

// to[c][r] = from[r][c], for each of `count` matrices of rows × columns.
inline void transpose(const float *from, float *to, int64_t count, int64_t rows, int64_t columns, int64_t threads) {
  const int64_t stripes = ceil_div(rows, SIDE);
  parallel(count * stripes, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t base = task / stripes * rows * columns, r0 = task % stripes * SIDE, r1 = least(rows, r0 + SIDE);
      for (int64_t c0 = 0; c0 < columns; c0 += SIDE) {
        const int64_t c1 = least(columns, c0 + SIDE);
        for (int64_t c = c0; c < c1; c++)
          for (int64_t r = r0; r < r1; r++) to[base + c * rows + r] = from[base + r * columns + c];
      }
    }
  });
}

}  // namespace
