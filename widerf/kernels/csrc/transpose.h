// Transposition, for channels_last.
#pragma once
#include "parallel.h"

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define WIDERF_SHUFFLE 1
#endif
#endif

namespace {

constexpr int64_t LINE = 16;  // floats in a cache line
// A result larger than this leaves the last cache before anybody reads it: it need not enter it.
constexpr int64_t STREAM_FLOATS = 1 << 20;

typedef float Four __attribute__((vector_size(16)));
typedef float LooseFour __attribute__((vector_size(16), aligned(4), may_alias));

// Transposes 4 × 4: out[c][r] = from[r·step + c].
WIDERF_INLINE void transpose_four(const float *from, int64_t step, Four out[4]) {
  const Four a = *(const LooseFour *)from, b = *(const LooseFour *)(from + step);
  const Four c = *(const LooseFour *)(from + 2 * step), d = *(const LooseFour *)(from + 3 * step);
#ifdef WIDERF_SHUFFLE
  const Four ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  out[0] = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5);
  out[1] = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
  out[2] = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
  out[3] = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
#else
  for (int i = 0; i < 4; i++) out[i] = Four{a[i], b[i], c[i], d[i]};
#endif
}

// to[c·to_step + r] = from[r·from_step + c] for 16 rows and 4 columns: a cache line for each column, written at once.
template <bool STREAM>
WIDERF_INLINE void transpose_lines(const float *from, int64_t from_step, float *to, int64_t to_step) {
  Four part[4][4];
  for (int i = 0; i < 4; i++) transpose_four(from + 4 * i * from_step, from_step, part[i]);
  for (int c = 0; c < 4; c++)
    for (int i = 0; i < 4; i++) {
      float *at = to + c * to_step + 4 * i;
#ifdef __SSE__
      if (STREAM) {
        _mm_stream_ps(at, (__m128)part[i][c]);
        continue;
      }
#endif
      *(LooseFour *)at = part[i][c];
    }
}

// to[c·to_step + r] = from[r·from_step + c], in blocks of cache lines: four lines of `to` at a time, because planes are
// often a power of two apart and would evict each other from the first cache. STREAM: past the caches; `to` is aligned.
template <bool STREAM>
void transpose(const float *from, int64_t from_step, float *to, int64_t to_step, int64_t rows, int64_t columns) {
  const int64_t lines = rows / LINE * LINE, whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t c0 = 0; c0 < whole_columns; c0 += LINE)
    for (int64_t r = 0; r < lines; r += LINE)
      for (int64_t c = c0; c < least(whole_columns, c0 + LINE); c += 4)
        transpose_lines<STREAM>(from + r * from_step + c, from_step, to + c * to_step + r, to_step);
  for (int64_t r = lines; r < whole_rows; r += 4)
    for (int64_t c = 0; c < whole_columns; c += 4) {
      Four part[4];
      transpose_four(from + r * from_step + c, from_step, part);
      for (int i = 0; i < 4; i++) *(LooseFour *)(to + (c + i) * to_step + r) = part[i];
    }
  for (int64_t c = 0; c < columns; c++)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; r++) to[c * to_step + r] = from[r * from_step + c];
}

// Writes a vector past the caches, where the processor can; `to` is aligned.
WIDERF_INLINE void store_past(float *to, Vec v) {
#if defined(__AVX512F__) && WIDERF_VECTOR_BYTES == 64
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX__) && WIDERF_VECTOR_BYTES == 32
  _mm256_stream_ps(to, (__m256)v);
#elif defined(__SSE__) && WIDERF_VECTOR_BYTES == 16
  _mm_stream_ps(to, (__m128)v);
#else
  store(to, v);
#endif
}

// What was written past the caches is there for other threads.
inline void stream_end() {
#ifdef __SSE__
  _mm_sfence();
#endif
}

// All of `samples` images, channels_last to planes or back.
inline void to_planes(const float *from, float *to, int64_t samples, int64_t pixels, int64_t channels, int64_t threads) {
  const int64_t stripes = ceil_div(channels, LINE);
  parallel(samples * stripes, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t base = task / stripes * pixels * channels, c = task % stripes * LINE;
      transpose<false>(from + base + c, channels, to + base + c * pixels, pixels, pixels, least(LINE, channels - c));
    }
  });
}

inline void from_planes(const float *from, float *to, int64_t samples, int64_t pixels, int64_t channels, int64_t threads) {
  const int64_t stripes = ceil_div(channels, LINE);
  parallel(samples * stripes, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t base = task / stripes * pixels * channels, c = task % stripes * LINE;
      transpose<false>(from + base + c * pixels, pixels, to + base + c, channels, least(LINE, channels - c), pixels);
    }
  });
}

}  // namespace
