// Gradients of a depthwise layer.
#pragma once
#include "depthwise.h"

namespace {

// The input's gradient, of one phase of the stride, is a convolution of the output's gradient with the taps that read
// this phase, their signs turned.
inline int grad_input_depthwise(const Shape &s, const int32_t *shifts, const float *g, const float *w, float *gx) {
  // Input pixel s·i + phase is read by output i + (phase − shift)/s.
  int64_t low_y = 0, low_x = 0, high_y = s.U - 1, high_x = s.V - 1;
  const int64_t far_y = ceil_div(s.H, s.sy) - 1, far_x = ceil_div(s.W, s.sx) - 1;
  for (int64_t k = 0; k < s.C * s.T; k++) {
    const int32_t *d = shifts + 2 * k;
    if (!alive(s, d)) continue;
    low_y = least(low_y, -floor_div(d[0], s.sy)), low_x = least(low_x, -floor_div(d[1], s.sx));
    high_y = most(high_y, far_y - floor_div(d[0], s.sy)), high_x = most(high_x, far_x - floor_div(d[1], s.sx));
  }
  const Bordered plane = {-low_y, -low_x, high_y - low_y + 1, high_x - low_x + 1, 1, 1, s.U, s.V};
  const Planes in(s.B, s.C, s.U, s.V, s.last), out(s.B, s.C, s.H, s.W, s.last);
  // A stride wider than the image has more phases than there are pixels.
  const int64_t down_to = least(s.sy, s.H), across = least(s.sx, s.W), steps = down_to * across;
  const int64_t width = together(s, plane), step = plane.floats();
  const bool whole = s.sy * s.sx == 1;  // one phase, and it is the image
  const int64_t band = s.last && whole ? least(BAND, s.H) : s.H;  // rows of all phases go out together
  const LiveTaps live(s, shifts, w, steps, [&](const int32_t *d, int64_t *at) {
    const int64_t y = floor_div(d[0], s.sy), x = floor_div(d[1], s.sx);
    *at = plane.at(-y, -x);
    const int64_t phase_y = d[0] - y * s.sy, phase_x = d[1] - x * s.sx;
    return phase_y < down_to && phase_x < across ? phase_y * across + phase_x : -1;
  });
  bool failed = !live.ok;
  const int64_t blocks = ceil_div(s.C, width);
  if (!failed) parallel(blocks * s.B, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<float> copy(width * step), line(width * s.V), phase_of(whole ? 0 : s.HW);
    Scratch<float> buffer(s.last ? width * band * s.W : 0);
    if (!copy.data || !line.data || !phase_of.data || !buffer.data) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    memset(copy.data, 0, (size_t)(width * step) * sizeof(float));
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / blocks, c0 = task % blocks * width, n = least(width, s.C - c0);
      for (int64_t y = 0, read = 0; y < s.H; y += band) {
        const int64_t rows = least(band, s.H - y), need = whole ? plane.needed(y + rows, s.H) : s.U;
        in.read(g, b, c0, n, read, need, plane, step, copy.data, line.data);
        for (int64_t i = 0; i < n; i++) {
          if (i + 1 < n) plane.prefetch(copy.data + (i + 1) * step, y, rows, s.H);
          for (int64_t phase = 0; phase < steps; phase++) {
            const int64_t list = live.list(c0 + i, phase);
            float *image = out.target(gx, b, c0, y, buffer.data + i * rows * s.W);
            const float *from = copy.data + i * step + y * plane.pitch;
            if (whole) {
              conv_plane(from, plane.pitch, rows, s.W, live, list, image, s.W);
              continue;
            }
            const int64_t y0 = phase / across, x0 = phase % across;
            const int64_t high = ceil_div(s.H - y0, s.sy), wide = ceil_div(s.W - x0, s.sx);
            if (high <= 0 || wide <= 0) continue;
            conv_plane(from, plane.pitch, high, wide, live, list, phase_of.data, wide);
            for (int64_t v = 0; v < high; v++)
              for (int64_t h = 0; h < wide; h++) image[(y0 + v * s.sy) * s.W + x0 + h * s.sx] = phase_of.data[v * wide + h];
          }
        }
        read = most(read, need);
        out.write(gx, b, c0, n, y, rows, buffer.data);
      }
    }
  });
  return failed;
}

// sums[j] += g · what tap j reads, for J taps over a whole plane. The last vector of a row ends with the row; its lanes
// that the one before has had are masked, or, in rows narrower than a vector (NARROW), those beyond the row.
template <int J, bool NARROW>
void plane_products(const Shape &s, const float *g, const float *x, int64_t pitch, const int64_t *at, float *sums) {
  Vec total[J];
  const float *from[J];
  for (int j = 0; j < J; j++) {
    total[j] = load(sums + j * VW);
    from[j] = x + at[j];
  }
  const int64_t height = s.U, width = s.V, whole = width / VW * VW, last = most(0, width - VW);
  int32_t lanes[VW];
  for (int i = 0; i < VW; i++) lanes[i] = NARROW ? -(i < width) : -(last + i >= whole);
  const IVec mask = load_mask(lanes);
  for (int64_t u = 0; u < height; u++, g += width) {
    const int64_t row = u * pitch;
    for (int64_t v = 0; v < whole; v += VW) {
      const Vec factor = load(g + v);
      for (int j = 0; j < J; j++) total[j] += factor * load(from[j] + row + v);
    }
    if (whole == width) continue;
    Vec factor;
    if (NARROW) {
      float few[VW] = {};
      memcpy(few, g, (size_t)width * sizeof(float));
      factor = load(few);
    } else {
      factor = keep(load(g + last), mask);
    }
    for (int j = 0; j < J; j++) total[j] += factor * keep(load(from[j] + row + last), mask);
  }
  for (int j = 0; j < J; j++) store(sums + j * VW, total[j]);
}

typedef void (*Products)(const Shape &, const float *, const float *, int64_t, const int64_t *, float *);
constexpr int64_t MOST_PRODUCTS = 9;
#define WIDERF_PRODUCTS(J) {plane_products<J, false>, plane_products<J, true>}
const Products PRODUCTS[MOST_PRODUCTS][2] = {
    WIDERF_PRODUCTS(1), WIDERF_PRODUCTS(2), WIDERF_PRODUCTS(3), WIDERF_PRODUCTS(4), WIDERF_PRODUCTS(5),
    WIDERF_PRODUCTS(6), WIDERF_PRODUCTS(7), WIDERF_PRODUCTS(8), WIDERF_PRODUCTS(9)};
#undef WIDERF_PRODUCTS

inline int grad_weight_depthwise(const Shape &s, const int32_t *shifts, const float *x, const float *g, float *gw) {
  const Bordered plane = border(s, shifts), bare = {0, 0, s.U, s.V, 1, 1, s.U, s.V};
  const Planes in(s.B, s.C, s.H, s.W, s.last), out(s.B, s.C, s.U, s.V, s.last);
  const int64_t width = together(s, plane), step = plane.floats();
  const LiveTaps live(s, shifts, nullptr, 1, [&](const int32_t *d, int64_t *at) { return *at = plane.at(d[0], d[1]), 0; });
  bool failed = !live.ok;
  memset(gw, 0, (size_t)(s.C * s.T) * sizeof(float));
  if (!failed) parallel(ceil_div(s.C, width), s.threads, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t first = begin * width, channels = least(s.C, end * width) - first;  // of this thread
    Scratch<float> copy(width * step), sums(channels * s.T * VW), line(width * s.W), gradient(s.last ? width * s.UV : 0);
    if (!copy.data || !sums.data || !line.data || !gradient.data) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    memset(copy.data, 0, (size_t)(width * step) * sizeof(float));
    memset(sums.data, 0, (size_t)(channels * s.T * VW) * sizeof(float));
    for (int64_t b = 0; b < s.B; b++)  // as the samples lie in memory
      for (int64_t c0 = 0; c0 < channels; c0 += width) {
        const int64_t n = least(width, channels - c0);
        in.read(x, b, first + c0, n, 0, s.H, plane, step, copy.data, line.data);
        if (s.last) out.read(g, b, first + c0, n, 0, s.U, bare, s.UV, gradient.data, nullptr);
        for (int64_t i = 0; i < n; i++) {
          const float *from = s.last ? gradient.data + i * s.UV : g + (b * s.C + first + c0) * s.UV;
          const int64_t list = live.list(first + c0 + i), taps = live.count.data[list], passes = ceil_div(taps, MOST_PRODUCTS);
          for (int64_t j = 0; j < passes; j++) {
            const int64_t j0 = j * taps / passes, j1 = (j + 1) * taps / passes;
            PRODUCTS[j1 - j0 - 1][s.V < VW](s, from, copy.data + i * step, plane.pitch, live.at.data + list * s.T + j0,
                                            sums.data + ((c0 + i) * s.T + j0) * VW);
          }
        }
      }
    for (int64_t c = 0; c < channels; c++)
      for (int64_t j = 0; j < live.count.data[first + c]; j++)
        gw[live.tap.data[(first + c) * s.T + j]] = sum(load(sums.data + (c * s.T + j) * VW));
  });
  return failed;
}

}  // namespace
