// Dense layers in channels_last whose neighbouring channels share their taps: forward, and gradient of the input.
#pragma once
#include "blocks.h"

namespace {

constexpr int NW = WIDERF_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of results side by side: AVX-512 has 32 registers
constexpr int64_t WIDE = NW * VW;
constexpr int most_rows(int64_t n) { return n == NW ? 6 : 8; }  // of a register tile n vectors wide
constexpr int64_t PIECE = 64;        // channels summed at a time: their weights stay in the first cache
constexpr int64_t CHUNK = 192;       // pixels that share these weights
constexpr int64_t OUTPUTS = 4 * 64;  // of a chunk whose sums stay in the second cache

// to[m][at …] += sum over c of from[m][channel + c] · weights[c], N vectors each.
template <int M, int N>
void pixels_tile(int64_t depth, const float *const *from, int64_t channel, const float *weights, float *const *to, int64_t at) {
  Vec sums[M][N];
  const float *x[M];
  WIDERF_UNROLL
  for (int m = 0; m < M; m++) {
    x[m] = from[m] + channel;
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) sums[m][n] = splat<Vec>(0.0f);
  }
  for (int64_t c = 0; c < depth; c++, weights += N * VW) {
    Vec w[N];
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) w[n] = load(weights + n * VW);
    WIDERF_UNROLL
    for (int m = 0; m < M; m++) {
      const Vec factor = splat<Vec>(x[m][c]);
      WIDERF_UNROLL
      for (int n = 0; n < N; n++) sums[m][n] += factor * w[n];
    }
  }
  WIDERF_UNROLL
  for (int m = 0; m < M; m++)
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) store(to[m] + at + n * VW, load(to[m] + at + n * VW) + sums[m][n]);
}

// The function Tiles::at<m, N> for m rows of N vectors.
template <typename Tiles, int N>
inline typename Tiles::Function tile_of(int64_t m) {
  constexpr typename Tiles::Function SMALL[6] = {Tiles::template at<1, N>, Tiles::template at<2, N>,
                                                 Tiles::template at<3, N>, Tiles::template at<4, N>,
                                                 Tiles::template at<5, N>, Tiles::template at<6, N>};
  if constexpr (most_rows(N) == 8) {
    if (m > 6) return m == 7 ? Tiles::template at<7, N> : Tiles::template at<8, N>;
  }
  return SMALL[m - 1];
}

template <typename Tiles>
inline typename Tiles::Function tile_of(int64_t m, int64_t n) {
  if constexpr (NW == 4) {
    if (n > 2) return n == 3 ? tile_of<Tiles, 3>(m) : tile_of<Tiles, NW>(m);
  }
  return n == 1 ? tile_of<Tiles, 1>(m) : tile_of<Tiles, 2>(m);
}

struct PixelsTiles {
  typedef void (*Function)(int64_t, const float *const *, int64_t, const float *, float *const *, int64_t);
  template <int M, int N>
  static constexpr Function at = pixels_tile<M, N>;
};

// Sums over `depth` channels of all pairs times a panel of weights, results begin … end − 1 of those that it has:
// [results/WIDE][channel][result % WIDE], begin a multiple of WIDE.
inline void multiply(const Pairs &pairs, int64_t depth, const float *panel, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o += WIDE) {
    const int64_t n = least(WIDE, round_up(end - o, VW)) / VW, tiles = ceil_div(pairs.count, most_rows(n));
    for (int64_t c = 0; c < depth; c += PIECE)
      for (int64_t i = 0; i < tiles; i++) {  // of about one size: a lone pixel would take as long as two
        const int64_t first = pairs.count * i / tiles, m = pairs.count * (i + 1) / tiles - first;
        tile_of<PixelsTiles>(m, n)(least(PIECE, depth - c), pairs.from.data + first, c, panel + o * depth + c * n * VW,
                              pairs.to.data + first, o - begin);
      }
  }
}

// Where channel c of tap t has its weights for the results from o on, in panels of a run of `width` channels for
// `outputs` results, a whole number of vectors.
inline int64_t panel_at(int64_t width, int64_t outputs, int64_t t, int64_t c, int64_t o) {
  const int64_t o0 = o / WIDE * WIDE;
  return (t * outputs + o0) * width + c * least(WIDE, outputs - o0) + o - o0;
}

// Weights (out, in, taps) as panels of each run's taps, or back from them (BACK): VW outputs at a time.
template <bool BACK, class W>
void panels(const Shape &s, const Runs &runs, W *w, float *to, int64_t o, float *lines) {
  const int64_t outputs = round_up(s.O, VW), n = least(VW, s.O - o);
  for (int64_t i = 0; i < runs.count; i++) {
    const int64_t width = runs.width(i), first = runs.start.data[i] * s.T;
    for (int64_t k0 = 0; k0 < width * s.T; k0 += PIECE) {
      const int64_t count = least(PIECE, width * s.T - k0);
      if constexpr (!BACK) transpose<false>(w + o * s.K + first + k0, s.K, lines, VW, n, count);
      for (int64_t k = k0, c = k0 / s.T, t = k0 % s.T; k < k0 + count; k++) {
        float *at = to + first * outputs + panel_at(width, outputs, t, c, o), *line = lines + (k - k0) * VW;
        store(BACK ? line : at, load(BACK ? at : line));
        if (++t == s.T) t = 0, c++;
      }
      if constexpr (BACK) transpose<false>(lines, VW, w + o * s.K + first + k0, s.K, count, n);
    }
  }
}

// The same of all outputs. False if there was no memory.
template <bool BACK, class W>
bool all_panels(const Shape &s, const Runs &runs, W *w, float *to) {
  bool failed = false;
  parallel(ceil_div(s.O, VW), s.threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<float> lines(PIECE * VW);
    if (!lines.data) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    memset(lines.data, 0, (size_t)(PIECE * VW) * sizeof(float));  // lanes beyond the last output
    for (int64_t i = begin; i < end; i++) panels<BACK>(s, runs, w, to, i * VW, lines.data);
  });
  return !failed;
}

// Chunks of about equal size.
struct Chunks {
  int64_t pixels, count;
  Chunks(int64_t pixels, int64_t threads, int64_t size)
      : pixels(pixels), count(most(ceil_div(pixels, size), least(pixels, threads))) {}
  int64_t begin(int64_t i) const { return pixels * i / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

// Calls sum(i, begin, end, pairs, sums, step) for each chunk begin … end − 1 of the way's pixels and each piece i of the
// results, whose first is starts[i]; the sums of pixel p, at sums[(p − begin)·step], begin as 0 and go to `result`.
template <class F>
int by_chunks(const Shape &s, const Way &way, int64_t channels, const int64_t *starts, int64_t pieces, float *result,
              const F &sum) {
  const Chunks chunks(s.B * way.height * way.width, s.threads, CHUNK);
  int64_t step = 0;
  for (int64_t i = 0; i < pieces; i++) step = most(step, round_up(starts[i + 1] - starts[i], VW));
  bool failed = false;
  parallel(chunks.count * pieces, s.threads, [&](int64_t, int64_t task0, int64_t task1) {
    Scratch<float> sums(CHUNK * step);
    Pairs pairs(CHUNK);
    if (!sums.data || !pairs.ok()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    for (int64_t task = task0; task < task1; task++) {
      const int64_t chunk = task / pieces, i = task % pieces, begin = chunks.begin(chunk), size = chunks.size(chunk);
      memset(sums.data, 0, (size_t)(size * step) * sizeof(float));
      sum(i, begin, begin + size, pairs, sums.data, step);
      for (int64_t p = 0; p < size; p++)
        memcpy(result + (begin + p) * channels + starts[i], sums.data + p * step,
               (size_t)(starts[i + 1] - starts[i]) * sizeof(float));
    }
  });
  return failed;
}

inline int forward_runs(const Shape &s, const int32_t *shifts, const float *x, const float *w, float *y) {
  const Runs runs(s, shifts);
  const Way way = onward(s);
  const int64_t outputs = round_up(s.O, VW), pieces = ceil_div(s.O, OUTPUTS);
  Scratch<float> weights(outputs * s.K);
  Scratch<int64_t> starts(pieces + 1);
  if (!runs.start.data || !weights.data || !starts.data || !all_panels<false>(s, runs, w, weights.data)) return 1;
  for (int64_t i = 0; i <= pieces; i++) starts.data[i] = least(s.O, i * OUTPUTS);
  return by_chunks(s, way, s.O, starts.data, pieces, y, [&](int64_t i, int64_t begin, int64_t end, Pairs &pairs, float *sums,
                                                               int64_t step) {
    for (int64_t r = 0; r < runs.count; r++) {
      const int64_t c = runs.start.data[r], width = runs.width(r);
      for (int64_t t = 0; t < s.T; t++) {
        pairs.fill(way, shifts + 2 * (c * s.T + t), x + c, begin, end, sums, step);
        multiply(pairs, width, weights.data + (c * s.T + t * width) * outputs, starts.data[i], starts.data[i + 1]);
      }
    }
  });
}

// Weights of a run as panels of its taps, whose channels are the outputs and whose results the run's channels.
inline void turned_panels(const Shape &s, const Runs &runs, int64_t run, const float *w, float *to) {
  const int64_t c0 = runs.start.data[run], width = runs.width(run), results = round_up(width, VW);
  for (int64_t o = 0; o < s.O; o++)
    for (int64_t c = 0; c < results; c += WIDE) {
      const int64_t wide = least(WIDE, results - c), count = least(wide, width - c);
      float *at = to + c * s.O + o * wide;
      transpose<false>(w + o * s.K + (c0 + c) * s.T, s.T, at, results * s.O, count, s.T);
      for (int64_t t = 0; t < s.T && count < wide; t++)
        memset(at + t * results * s.O + count, 0, (size_t)(wide - count) * sizeof(float));
    }
}

inline int grad_input_runs(const Shape &s, const int32_t *shifts, const float *g, const float *w, float *gx) {
  const Runs runs(s, shifts);
  const Way way = back(s);
  if (!runs.start.data) return 1;
  Scratch<float> weights((s.C + runs.count * VW) * s.T * s.O);
  Scratch<int64_t> at(runs.count + 1);
  if (!weights.data || !at.data) return 1;
  at.data[0] = 0;
  for (int64_t i = 0; i < runs.count; i++) at.data[i + 1] = at.data[i] + round_up(runs.width(i), VW) * s.T * s.O;
  parallel(runs.count, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) turned_panels(s, runs, i, w, weights.data + at.data[i]);
  });
  return by_chunks(s, way, s.C, runs.start.data, runs.count, gx, [&](int64_t i, int64_t begin, int64_t end, Pairs &pairs,
                                                                         float *sums, int64_t step) {
    const int64_t width = runs.width(i);
    for (int64_t t = 0; t < s.T; t++) {
      pairs.fill(way, shifts + 2 * (runs.start.data[i] * s.T + t), g, begin, end, sums, step);
      multiply(pairs, s.O, weights.data + at.data[i] + t * round_up(width, VW) * s.O, 0, width);
    }
  });
}

}  // namespace
