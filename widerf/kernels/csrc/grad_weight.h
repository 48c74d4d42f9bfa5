// Gradient of the weights: sums over pixels of column times gradient. The outputs are the lanes, the rows of columns
// the factors, so that taps need not agree between channels.
#pragma once
#include "forward.h"

namespace {

constexpr int64_t RUN_TILES = 256 / NR;      // pixels summed at a time
constexpr int64_t RUN = RUN_TILES * NR;
constexpr int64_t BLOCK_ROWS = 16 * MR;      // rows of columns packed at a time

// sums[m][o] += sum over p of rows[m·RUN + p] · g[p·NR + o]
template <int M>
void grad_weight_tile(int64_t begin, int64_t end, const float *rows, const float *g, float *sums) {
  Vec sum_[M][NV];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) sum_[m][v] = splat<Vec>(0.0f);
  for (int64_t p = begin; p < end; p++) {
    Vec lane[NV];
    for (int v = 0; v < NV; v++) lane[v] = load(g + p * NR + v * VW);
    for (int m = 0; m < M; m++) {
      const Vec factor = splat<Vec>(rows[m * RUN + p]);
      for (int v = 0; v < NV; v++) sum_[m][v] += factor * lane[v];
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) store(sums + m * NR + v * VW, load(sums + m * NR + v * VW) + sum_[m][v]);
}

typedef void (*WeightTile)(int64_t, int64_t, const float *, const float *, float *);
const WeightTile WEIGHT_TILE[MR] = {grad_weight_tile<1>, grad_weight_tile<2>, grad_weight_tile<3>,
                                    grad_weight_tile<4>, grad_weight_tile<5>, grad_weight_tile<6>};

// Writes g as [o/NR][pixel][o%NR], 0 beyond the last output and pixel.
inline void transpose_gradient(const Shape &s, const float *g, int64_t pixel, float *to) {
  const int64_t count = least(RUN, s.UV - pixel);
  for (int64_t o0 = 0; o0 < s.Og; o0 += NR, to += RUN * NR) {
    const int64_t wide = least(NR, s.Og - o0);
    if (wide < NR || count < RUN) memset(to, 0, (size_t)(RUN * NR) * sizeof(float));
    for (int64_t p0 = 0; p0 < count; p0 += 16) {  // a cache line of each output at a time
      const int64_t p1 = least(count, p0 + 16);
      for (int64_t o = 0; o < wide; o++) {
        const float *from = g + (o0 + o) * s.UV + pixel;
        for (int64_t p = p0; p < p1; p++) to[p * NR + o] = from[p];
      }
    }
  }
}

struct WeightScratch {
  Tiles tiles;
  Scratch<float> columns, g, sums;
  bool ok;
  WeightScratch(const Shape &s, const Rows &rows, int64_t count)
      : tiles(rows, RUN_TILES), columns(BLOCK_ROWS * RUN), g(RUN * round_up(s.Og, NR)), sums(count * round_up(s.Og, NR)),
        ok(tiles.ok && columns.data && g.data && sums.data) {
    if (ok) memset(sums.data, 0, (size_t)(count * round_up(s.Og, NR)) * sizeof(float));
  }
};

// Adds what a run of pixels of one sample gives to the sums of `count` rows, which are sorted by their shift in y.
inline void grad_weight_run(const Shape &s, const Row *row, int64_t count, const float *x, int64_t base, int64_t tiles,
                            WeightScratch &scratch) {
  int64_t begin[BLOCK_ROWS / MR], end[BLOCK_ROWS / MR];
  for (int64_t r0 = 0; r0 < count; r0 += BLOCK_ROWS) {
    const int64_t rows = least(BLOCK_ROWS, count - r0);
    for (int64_t r = 0; r < rows; r += MR) {  // the tiles of pixels that any of the rows reads anything for
      int64_t first = tiles, last = 0;
      for (int64_t i = 0; i < tiles; i++)
        for (int64_t m = r; m < least(rows, r + MR); m++)
          if (reads(scratch.tiles.tile.data[i], row[r0 + m])) first = least(first, i), last = i + 1;
      begin[r / MR] = first, end[r / MR] = last;
      for (int64_t m = r; m < least(rows, r + MR); m++)
        for (int64_t i = first; i < last; i++) {
          const Tile &t = scratch.tiles.tile.data[i];
          float *to = scratch.columns.data + m * RUN + i * NR;
          if (reads(t, row[r0 + m]))
            pack(t, row[r0 + m], x, base, s.B * s.C * s.HW, to);
          else
            for (int v = 0; v < NV; v++) store(to + v * VW, splat<Vec>(0.0f));
        }
    }
    for (int64_t o = 0; o < round_up(s.Og, NR); o += NR)
      for (int64_t r = 0; r < rows; r += MR)
        if (begin[r / MR] < end[r / MR])
          WEIGHT_TILE[least(MR, rows - r) - 1](begin[r / MR] * NR, end[r / MR] * NR, scratch.columns.data + r * RUN,
                                               scratch.g.data + o * RUN, scratch.sums.data + o * count + (r0 + r) * NR);
  }
}

inline int grad_weight_dense(const Shape &s, const int32_t *shifts, const float *x, const float *g, float *gw) {
  const Rows rows(s, shifts, BY_SHIFT);
  if (!rows.ok) return 1;
  memset(gw, 0, (size_t)(s.O * s.K) * sizeof(float));
  const int64_t parts = s.G % s.threads == 0 || s.G >= 8 * s.threads ? 1 : s.threads;
  bool failed = false;
  parallel(s.G * parts, s.threads, [&](int64_t, int64_t task0, int64_t task1) {
    for (int64_t task = task0; task < task1; task++) {
      const int64_t group = task / parts, part = task % parts;
      const int64_t all = rows.start.data[group + 1] - rows.start.data[group];
      const int64_t r0 = all * part / parts, count = all * (part + 1) / parts - r0;
      const Row *row = rows.row.data + rows.start.data[group] + r0;
      WeightScratch scratch(s, rows, count);
      if (!scratch.ok) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t b = 0; b < s.B && count; b++)
        for (int64_t pixel = 0; pixel < s.UV; pixel += RUN) {
          const int64_t tiles = ceil_div(least(RUN, s.UV - pixel), NR);
          for (int64_t i = 0; i < tiles; i++) make_tile(s, rows, pixel + i * NR, scratch.tiles.tile.data[i]);
          transpose_gradient(s, g + (b * s.O + group * s.Og) * s.UV, pixel, scratch.g.data);
          grad_weight_run(s, row, count, x, (b * s.C + group * s.Cg) * s.HW, tiles, scratch);
        }
      for (int64_t o = 0; o < s.Og; o++)
        for (int64_t r = 0; r < count; r++)
          gw[(group * s.Og + o) * s.K + row[r].k] = scratch.sums.data[o / NR * NR * count + r * NR + o % NR];
    }
  });
  return failed;
}

}  // namespace
