// Gradient of the weights of dense layers in channels_last whose neighbouring channels share their taps.
#pragma once
#include "blocks_dense.h"

namespace {

constexpr int64_t SUMMED = 96;  // pixels summed at a time: what they read stays in the first cache

// sums[m·N·VW …] += sum over the pairs of from[channel + m] · to[o …], N vectors.
template <int M, int N>
void pairs_tile(int64_t count, const float *const *from, int64_t channel, const float *const *to, float *sums) {
  Vec part[M][N];
  WIDERF_UNROLL
  for (int m = 0; m < M; m++)
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) part[m][n] = splat<Vec>(0.0f);
  for (int64_t i = 0; i < count; i++) {
    const float *x = from[i] + channel, *g = to[i];
    Vec lane[N];
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) lane[n] = load(g + n * VW);
    WIDERF_UNROLL
    for (int m = 0; m < M; m++) {
      const Vec factor = splat<Vec>(x[m]);
      WIDERF_UNROLL
      for (int n = 0; n < N; n++) part[m][n] += factor * lane[n];
    }
  }
  WIDERF_UNROLL
  for (int m = 0; m < M; m++)
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) {
      float *at = sums + (m * N + n) * VW;
      store(at, load(at) + part[m][n]);
    }
}

struct PairsTiles {
  typedef void (*Function)(int64_t, const float *const *, int64_t, const float *const *, float *);
  template <int M, int N>
  static constexpr Function at = pairs_tile<M, N>;
};

// Copies outputs o … o + wide − 1 of some pixels; lanes beyond stay as they are.
inline void gather_outputs(const float *g, int64_t outputs, int64_t pixels, int64_t o, int64_t wide, int64_t step, float *to) {
  for (int64_t p = 0; p < pixels; p++) memcpy(to + p * step, g + p * outputs + o, (size_t)wide * sizeof(float));
}

// Taps t0 … t1 − 1 of run r, outputs from o on, over all pixels in their order. `sums` are panels, at 0.
inline void sum_taps(const Shape &s, const Runs &runs, const int32_t *shifts, int64_t r, int64_t o, int64_t t0, int64_t t1,
                     const float *x, const float *g, float *lanes, Pairs &pairs, float *sums) {
  const Way way = onward(s);
  const int64_t outputs = round_up(s.O, VW), n = least(WIDE, outputs - o) / VW, wide = least(WIDE, s.O - o);
  const int64_t c = runs.start.data[r], width = runs.width(r), tiles = ceil_div(width, most_rows(n));
  const Chunks chunks(s.B * s.UV, 1, SUMMED);
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    const int64_t begin = chunks.begin(chunk), size = chunks.size(chunk);
    gather_outputs(g + begin * s.O, s.O, size, o, wide, n * VW, lanes);
    for (int64_t t = t0; t < t1; t++) {
      pairs.fill(way, shifts + 2 * (c * s.T + t), x + c, begin, begin + size, lanes, n * VW);
      if (!pairs.count) continue;
      float *panel = sums + c * s.T * outputs + panel_at(width, outputs, t, 0, o);
      for (int64_t i = 0; i < tiles; i++) {
        const int64_t first = width * i / tiles, m = width * (i + 1) / tiles - first;
        tile_of<PairsTiles>(m, n)(pairs.count, pairs.from.data, first, pairs.to.data, panel + first * n * VW);
      }
    }
  }
}

inline int grad_weight_runs(const Shape &s, const int32_t *shifts, const float *x, const float *g, float *gw) {
  const Runs runs(s, shifts);
  const int64_t outputs = round_up(s.O, VW), wides = ceil_div(outputs, WIDE);
  Scratch<float> sums(outputs * s.K);
  if (!runs.start.data || !sums.data) return 1;
  memset(sums.data, 0, (size_t)(outputs * s.K) * sizeof(float));
  // Each sum is one thread's: how many there are does not change a bit.
  const int64_t parts = s.threads == 1 ? 1 : s.T;
  bool failed = false;
  parallel(runs.count * wides * parts, s.threads, [&](int64_t, int64_t task0, int64_t task1) {
    Scratch<float> lanes(SUMMED * WIDE);
    Pairs pairs(SUMMED);
    if (!lanes.data || !pairs.ok()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    memset(lanes.data, 0, (size_t)(SUMMED * WIDE) * sizeof(float));
    for (int64_t task = task0; task < task1; task++) {
      const int64_t part = task % parts, o = task / parts % wides * WIDE, r = task / parts / wides;
      sum_taps(s, runs, shifts, r, o, s.T * part / parts, s.T * (part + 1) / parts, x, g, lanes.data, pairs, sums.data);
    }
  });
  return failed || !all_panels<true>(s, runs, gw, sums.data);
}

}  // namespace
