// Depthwise: a plane at a time is copied into a zero border, so that no tap needs a mask, and stays in the first cache.
#pragma once
#include "taps.h"

namespace {

// A plane with a border, split by stride into phases, so that each tap reads neighbours for neighbouring outputs.
struct Bordered {
  int64_t top, left, rows, pitch, phases_y, phases_x, height, width;

  int64_t floats() const { return phases_y * phases_x * rows * pitch + 2 * VW; }
  // Where pixel (y, x) is; it may lie in the border.
  int64_t at(int64_t y, int64_t x) const {
    y += top, x += left;
    return ((y % phases_y * phases_x + x % phases_x) * rows + y / phases_y) * pitch + x / phases_x;
  }
  void fill(const float *from, float *to) const {
    for (int64_t y = 0; y < height; y++, from += width) {
      if (phases_x == 1) {
        memcpy(to + at(y, 0), from, (size_t)width * sizeof(float));
        continue;
      }
      for (int64_t x = 0; x < width; x++) to[at(y, x)] = from[x];
    }
  }
  void empty(const float *from, float *to) const {
    for (int64_t y = 0; y < height; y++, to += width)
      for (int64_t x = 0; x < width; x++) to[x] = from[at(y, x)];
  }
};

inline bool alive(const Shape &s, const int32_t *d) {
  return d[0] >= -s.sy * (s.U - 1) && d[0] < s.H && d[1] >= -s.sx * (s.V - 1) && d[1] < s.W;
}

// The border that holds what the live taps of all channels read for all outputs.
inline Bordered border(const Shape &s, const int32_t *shifts) {
  int64_t low_y = 0, low_x = 0, high_y = s.H - 1, high_x = s.W - 1;
  for (int64_t k = 0; k < s.C * s.T; k++) {
    const int32_t *d = shifts + 2 * k;
    if (!alive(s, d)) continue;
    low_y = least(low_y, d[0]), low_x = least(low_x, d[1]);
    high_y = most(high_y, d[0] + s.sy * (s.U - 1)), high_x = most(high_x, d[1] + s.sx * (s.V - 1));
  }
  return {-low_y, -low_x, ceil_div(high_y - low_y + 1, s.sy), ceil_div(high_x - low_x + 1, s.sx), s.sy, s.sx, s.H, s.W};
}

// R rows of A vectors; the last vector ends at `width`, so it may repeat some of the one before.
template <int R, int A>
WIDERF_INLINE void conv_patch(const float *x, int64_t pitch, int64_t width, const float *w, const int64_t *at, int64_t taps,
                              float *y, int64_t step) {
  const int64_t last = most(0, width - VW);
  Vec sums[R][A];
  for (int r = 0; r < R; r++)
    for (int a = 0; a < A; a++) sums[r][a] = splat<Vec>(0.0f);
  for (int64_t t = 0; t < taps; t++) {
    const Vec factor = splat<Vec>(w[t]);
    const float *from = x + at[t];
    for (int r = 0; r < R; r++)
      for (int a = 0; a < A; a++) sums[r][a] += factor * load(from + r * pitch + (a + 1 < A ? a * VW : last));
  }
  for (int r = 0; r < R; r++) {
    if (width < VW) {
      float lanes[VW];
      store(lanes, sums[r][0]);
      memcpy(y + r * step, lanes, (size_t)width * sizeof(float));
      continue;
    }
    for (int a = 0; a < A; a++) store(y + r * step + (a + 1 < A ? a * VW : last), sums[r][a]);
  }
}

template <int A>
void conv_stripe(const float *x, int64_t pitch, int64_t width, int64_t height, const float *w, const int64_t *at,
                 int64_t taps, float *y, int64_t step) {
  constexpr int R = 8 / A;
  int64_t u = 0;
  for (; u + R <= height; u += R) conv_patch<R, A>(x + u * pitch, pitch, width, w, at, taps, y + u * step, step);
  for (; u < height; u++) conv_patch<1, A>(x + u * pitch, pitch, width, w, at, taps, y + u * step, step);
}

typedef void (*Stripe)(const float *, int64_t, int64_t, int64_t, const float *, const int64_t *, int64_t, float *, int64_t);
const Stripe STRIPE[8] = {conv_stripe<1>, conv_stripe<2>, conv_stripe<3>, conv_stripe<4>,
                          conv_stripe<5>, conv_stripe<6>, conv_stripe<7>, conv_stripe<8>};

// y[u][v] = sum over t of w[t] · x[at[t] + u·pitch + v], height × width outputs.
inline void conv_plane(const float *x, int64_t pitch, int64_t height, int64_t width, const float *w, const int64_t *at,
                       int64_t taps, float *y, int64_t step) {
  const int64_t stripes = ceil_div(width, 8 * VW);
  int64_t v = 0;
  for (int64_t i = 0; i < stripes; i++) {
    const int64_t vectors = ceil_div(ceil_div(width - v, VW), stripes - i), wide = least(width - v, vectors * VW);
    STRIPE[vectors - 1](x + v, pitch, wide, height, w, at, taps, y + v, step);
    v += wide;
  }
}

inline int forward_depthwise(const Shape &s, const int32_t *shifts, const float *x, const float *w, float *y) {
  const Bordered plane = border(s, shifts);
  bool failed = false;
  parallel(s.C, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<float> copy(plane.floats()), live(s.T);
    Scratch<int64_t> at(s.T);
    if (!copy.data || !live.data || !at.data) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    memset(copy.data, 0, (size_t)plane.floats() * sizeof(float));
    for (int64_t c = begin; c < end; c++) {
      int64_t n = 0;
      for (int64_t t = 0; t < s.T; t++) {
        const int32_t *d = shifts + 2 * (c * s.T + t);
        if (!alive(s, d)) continue;
        live.data[n] = w[c * s.T + t];
        at.data[n++] = plane.at(d[0], d[1]);
      }
      for (int64_t b = 0; b < s.B; b++) {
        plane.fill(x + (b * s.C + c) * s.HW, copy.data);
        conv_plane(copy.data, plane.pitch, s.U, s.V, live.data, at.data, n, y + (b * s.C + c) * s.UV, s.V);
      }
    }
  });
  return failed;
}

}  // namespace
