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
  auto down = [](int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); };
  for (int64_t k = 0; k < s.C * s.T; k++) {
    const int32_t *d = shifts + 2 * k;
    if (!alive(s, d)) continue;
    low_y = least(low_y, -down(d[0], s.sy)), low_x = least(low_x, -down(d[1], s.sx));
    high_y = most(high_y, far_y - down(d[0], s.sy)), high_x = most(high_x, far_x - down(d[1], s.sx));
  }
  const Bordered plane = {-low_y, -low_x, high_y - low_y + 1, high_x - low_x + 1, 1, 1, s.U, s.V};
  bool failed = false;
  parallel(s.C, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t steps = s.sy * s.sx, wide = ceil_div(s.W, s.sx);
    Scratch<float> copy(plane.floats()), live(s.T * steps), phase_of(steps > 1 ? ceil_div(s.H, s.sy) * wide : 0);
    Scratch<int64_t> at(s.T * steps), count(steps);
    if (!copy.data || !live.data || !at.data || !count.data || !phase_of.data) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    memset(copy.data, 0, (size_t)plane.floats() * sizeof(float));
    for (int64_t c = begin; c < end; c++) {
      memset(count.data, 0, (size_t)steps * sizeof(int64_t));
      for (int64_t t = 0; t < s.T; t++) {
        const int32_t *d = shifts + 2 * (c * s.T + t);
        if (!alive(s, d)) continue;
        const int64_t y = down(d[0], s.sy), x = down(d[1], s.sx), phase = (d[0] - y * s.sy) * s.sx + d[1] - x * s.sx;
        const int64_t n = phase * s.T + count.data[phase]++;
        live.data[n] = w[c * s.T + t];
        at.data[n] = plane.at(-y, -x);
      }
      for (int64_t b = 0; b < s.B; b++) {
        float *image = gx + (b * s.C + c) * s.HW;
        plane.fill(g + (b * s.C + c) * s.UV, copy.data);
        for (int64_t phase = 0; phase < steps; phase++) {
          const int64_t y0 = phase / s.sx, x0 = phase % s.sx;
          const int64_t height = ceil_div(s.H - y0, s.sy), width = ceil_div(s.W - x0, s.sx);
          if (height <= 0 || width <= 0) continue;
          conv_plane(copy.data, plane.pitch, height, width, live.data + phase * s.T, at.data + phase * s.T,
                     count.data[phase], steps > 1 ? phase_of.data : image, width);
          for (int64_t i = 0; steps > 1 && i < height; i++)
            for (int64_t j = 0; j < width; j++)
              image[(y0 + i * s.sy) * s.W + x0 + j * s.sx] = phase_of.data[i * width + j];
        }
      }
    }
  });
  return failed;
}

// sums[j] += g · what tap j reads, for J taps over a whole plane. The last vector of a row ends with the row; its lanes
// that the one before has had are masked, or, in rows narrower than a vector, those beyond the row.
template <int J>
void plane_products(const Shape &s, const float *g, const float *x, int64_t pitch, const int64_t *at, float *sums) {
  Vec total[J];
  const float *from[J];
  for (int j = 0; j < J; j++) {
    total[j] = load(sums + j * VW);
    from[j] = x + at[j];
  }
  const int64_t whole = s.V / VW * VW, last = most(0, s.V - VW);
  int32_t lanes[VW];
  for (int i = 0; i < VW; i++) lanes[i] = s.V < VW ? -(i < s.V) : -(last + i >= whole);
  const IVec mask = load_mask(lanes);
  for (int64_t u = 0; u < s.U; u++) {
    const int64_t row = u * pitch;
    for (int64_t v = 0; v < whole; v += VW) {
      const Vec factor = load(g + u * s.V + v);
      for (int j = 0; j < J; j++) total[j] += factor * load(from[j] + row + v);
    }
    if (whole == s.V) continue;
    Vec factor;
    if (s.V < VW) {
      float few[VW] = {};
      memcpy(few, g + u * s.V, (size_t)s.V * sizeof(float));
      factor = load(few);
    } else {
      factor = keep(load(g + u * s.V + last), mask);
    }
    for (int j = 0; j < J; j++) total[j] += factor * keep(load(from[j] + row + last), mask);
  }
  for (int j = 0; j < J; j++) store(sums + j * VW, total[j]);
}

typedef void (*Products)(const Shape &, const float *, const float *, int64_t, const int64_t *, float *);
constexpr int64_t MOST_PRODUCTS = 9;
const Products PRODUCTS[MOST_PRODUCTS] = {plane_products<1>, plane_products<2>, plane_products<3>,
                                          plane_products<4>, plane_products<5>, plane_products<6>,
                                          plane_products<7>, plane_products<8>, plane_products<9>};

inline int grad_weight_depthwise(const Shape &s, const int32_t *shifts, const float *x, const float *g, float *gw) {
  const Bordered plane = border(s, shifts);
  bool failed = false;
  parallel(s.C, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<float> copy(plane.floats()), sums(s.T * VW);
    Scratch<int64_t> at(s.T), tap(s.T);
    if (!copy.data || !sums.data || !at.data || !tap.data) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    memset(copy.data, 0, (size_t)plane.floats() * sizeof(float));
    for (int64_t c = begin; c < end; c++) {
      int64_t n = 0;
      for (int64_t t = 0; t < s.T; t++) {
        const int32_t *d = shifts + 2 * (c * s.T + t);
        gw[c * s.T + t] = 0;
        if (!alive(s, d)) continue;
        tap.data[n] = t;
        at.data[n++] = plane.at(d[0], d[1]);
      }
      memset(sums.data, 0, (size_t)(s.T * VW) * sizeof(float));
      const int64_t passes = ceil_div(n, MOST_PRODUCTS);
      for (int64_t b = 0; b < s.B; b++) {
        plane.fill(x + (b * s.C + c) * s.HW, copy.data);
        for (int64_t i = 0; i < passes; i++) {
          const int64_t j0 = i * n / passes, j1 = (i + 1) * n / passes;
          PRODUCTS[j1 - j0 - 1](s, g + (b * s.C + c) * s.UV, copy.data, plane.pitch, at.data + j0, sums.data + j0 * VW);
        }
      }
      for (int64_t i = 0; i < n; i++) gw[c * s.T + tap.data[i]] = sum(load(sums.data + i * VW));
    }
  });
  return failed;
}

}  // namespace
