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
  const Planes in(s.B, s.C, s.U, s.V, s.last), out(s.B, s.C, s.H, s.W, s.last);
  const int64_t steps = s.sy * s.sx, width = together(s, plane), step = plane.floats();
  const int64_t band = s.last && steps == 1 ? least(BAND, s.H) : s.H;  // rows of all phases go out together
  bool failed = false;
  const int64_t blocks = ceil_div(s.C, width);
  parallel(blocks * s.B, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<float> copy(width * step), live(width * steps * s.T), line(width * s.V), phase_of(steps > 1 ? s.HW : 0);
    Scratch<float> buffer(s.last ? width * band * s.W : 0);
    Scratch<int64_t> at(width * steps * s.T), count(width * steps);
    if (!copy.data || !live.data || !line.data || !at.data || !count.data || !phase_of.data || !buffer.data) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    memset(copy.data, 0, (size_t)(width * step) * sizeof(float));
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / blocks, c0 = task % blocks * width, n = least(width, s.C - c0);
      memset(count.data, 0, (size_t)(n * steps) * sizeof(int64_t));
      for (int64_t i = 0; i < n; i++)
        for (int64_t t = 0; t < s.T; t++) {
          const int32_t *d = shifts + 2 * ((c0 + i) * s.T + t);
          if (!alive(s, d)) continue;
          const int64_t y = down(d[0], s.sy), x = down(d[1], s.sx);
          const int64_t phase = i * steps + (d[0] - y * s.sy) * s.sx + d[1] - x * s.sx;
          const int64_t k = phase * s.T + count.data[phase]++;
          live.data[k] = w[(c0 + i) * s.T + t];
          at.data[k] = plane.at(-y, -x);
        }
      for (int64_t y = 0, read = 0; y < s.H; y += band) {
        const int64_t rows = least(band, s.H - y), need = steps == 1 ? plane.needed(y + rows, s.H) : s.U;
        in.read(g, b, c0, n, read, need, plane, step, copy.data, line.data);
        for (int64_t i = 0; i < n; i++) {
          if (i + 1 < n) plane.prefetch(copy.data + (i + 1) * step, y, rows, s.H);
          for (int64_t phase = 0; phase < steps; phase++) {
            const int64_t k = (i * steps + phase) * s.T, taps = count.data[i * steps + phase];
            float *image = out.target(gx, b, c0, y, buffer.data + i * rows * s.W);
            const float *from = copy.data + i * step + y * plane.pitch;
            if (steps == 1) {
              conv_plane(from, plane.pitch, rows, s.W, live.data + k, at.data + k, taps, image, s.W);
              continue;
            }
            const int64_t y0 = phase / s.sx, x0 = phase % s.sx;
            const int64_t high = ceil_div(s.H - y0, s.sy), wide = ceil_div(s.W - x0, s.sx);
            if (high <= 0 || wide <= 0) continue;
            conv_plane(from, plane.pitch, high, wide, live.data + k, at.data + k, taps, phase_of.data, wide);
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
  const Bordered plane = border(s, shifts), bare = {0, 0, s.U, s.V, 1, 1, s.U, s.V};
  const Planes in(s.B, s.C, s.H, s.W, s.last), out(s.B, s.C, s.U, s.V, s.last);
  const int64_t width = together(s, plane), step = plane.floats();
  bool failed = false;
  parallel(ceil_div(s.C, width), s.threads, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t first = begin * width, channels = least(s.C, end * width) - first;  // of this thread
    Scratch<float> copy(width * step), sums(channels * s.T * VW), line(width * s.W), gradient(s.last ? width * s.UV : 0);
    Scratch<int64_t> at(channels * s.T), tap(channels * s.T), count(channels);
    if (!copy.data || !sums.data || !line.data || !gradient.data || !at.data || !tap.data || !count.data) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    memset(copy.data, 0, (size_t)(width * step) * sizeof(float));
    memset(sums.data, 0, (size_t)(channels * s.T * VW) * sizeof(float));
    for (int64_t c = 0; c < channels; c++) {
      count.data[c] = 0;
      for (int64_t t = 0; t < s.T; t++) {
        const int64_t k = (first + c) * s.T + t;
        gw[k] = 0;
        if (!alive(s, shifts + 2 * k)) continue;
        tap.data[c * s.T + count.data[c]] = k;
        at.data[c * s.T + count.data[c]++] = plane.at(shifts[2 * k], shifts[2 * k + 1]);
      }
    }
    for (int64_t b = 0; b < s.B; b++)  // as the samples lie in memory
      for (int64_t c0 = 0; c0 < channels; c0 += width) {
        const int64_t n = least(width, channels - c0);
        in.read(x, b, first + c0, n, 0, s.H, plane, step, copy.data, line.data);
        if (s.last) out.read(g, b, first + c0, n, 0, s.U, bare, s.UV, gradient.data, nullptr);
        for (int64_t i = 0; i < n; i++) {
          const float *from = s.last ? gradient.data + i * s.UV : g + (b * s.C + first + c0) * s.UV;
          const int64_t taps = count.data[c0 + i], passes = ceil_div(taps, MOST_PRODUCTS);
          for (int64_t j = 0; j < passes; j++) {
            const int64_t j0 = j * taps / passes, j1 = (j + 1) * taps / passes, k = (c0 + i) * s.T + j0;
            PRODUCTS[j1 - j0 - 1](s, from, copy.data + i * step, plane.pitch, at.data + k, sums.data + k * VW);
          }
        }
      }
    for (int64_t c = 0; c < channels; c++)
      for (int64_t j = 0; j < count.data[c]; j++) gw[tap.data[c * s.T + j]] = sum(load(sums.data + (c * s.T + j) * VW));
  });
  return failed;
}

}  // namespace
