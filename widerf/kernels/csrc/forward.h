// Forward: for each block of pixels the columns are packed, a few channels at a time, and multiplied by the weights.
#pragma once
#include "taps.h"

namespace {

constexpr int64_t DEPTH = 256;      // rows of columns packed at a time: a tile of them stays in the first cache
constexpr int64_t TILES = 8;        // tiles of pixels that share a piece of the weights in the second cache
constexpr int64_t L2_FLOATS = 49152;  // of weights used at a time

// sums(M × NR) of n rows: sum over i of weights[list[i] + m] · panel[i].
template <int M, int N>
WIDERF_INLINE void forward_sums(int64_t n, const float *panel, const float *weights, const int32_t *list, Vec sums[M][N]) {
  for (int m = 0; m < M; m++)
    for (int v = 0; v < N; v++) sums[m][v] = splat<Vec>(0.0f);
  for (int64_t i = 0; i < n; i++) {
    const float *w = weights + list[i];
    Vec column[N];
    for (int v = 0; v < N; v++) column[v] = load(panel + i * NR + v * VW);
    for (int m = 0; m < M; m++) {
      const Vec factor = splat<Vec>(w[m]);
      for (int v = 0; v < N; v++) sums[m][v] += factor * column[v];
    }
  }
}

template <int M, int N>
void forward_tile(int64_t n, const float *panel, const float *weights, const int32_t *list, float *y, int64_t step,
                  int64_t count, bool fresh) {
  Vec sums[M][N];
  forward_sums<M, N>(n, panel, weights, list, sums);
  for (int m = 0; m < M; m++) {
    float *to = y + m * step;
    if (count == N * VW) {
      for (int v = 0; v < N; v++) store(to + v * VW, fresh ? sums[m][v] : load(to + v * VW) + sums[m][v]);
      continue;
    }
    float lanes[N * VW];
    for (int v = 0; v < N; v++) store(lanes + v * VW, sums[m][v]);
    for (int64_t i = 0; i < count; i++) to[i] = fresh ? lanes[i] : to[i] + lanes[i];
  }
}

typedef void (*ForwardTile)(int64_t, const float *, const float *, const int32_t *, float *, int64_t, int64_t, bool);
const ForwardTile FORWARD_TILE[MR][NV] = {{forward_tile<1, 1>, forward_tile<1, 2>}, {forward_tile<2, 1>, forward_tile<2, 2>},
                                          {forward_tile<3, 1>, forward_tile<3, 2>}, {forward_tile<4, 1>, forward_tile<4, 2>},
                                          {forward_tile<5, 1>, forward_tile<5, 2>}, {forward_tile<6, 1>, forward_tile<6, 2>}};

// weights[o/MR][row][o%MR] of one group, 0 beyond the last output.
inline void pack_weights(const Shape &s, const float *w, const Row *row, int64_t rows, float *to) {
  for (int64_t o = 0; o < s.Og; o += MR)
    for (int64_t r = 0; r < rows; r++)
      for (int m = 0; m < MR; m++) *to++ = o + m < s.Og ? w[(o + m) * s.K + row[r].k] : 0.0f;
}

struct ForwardScratch {
  Tiles tiles;
  Scratch<float> panel;
  Scratch<int32_t> list;
  bool ok;
  explicit ForwardScratch(const Rows &rows)
      : tiles(rows, TILES), panel(TILES * DEPTH * NR), list(TILES * DEPTH), ok(tiles.ok && panel.data && list.data) {}
};

// y of one sample, group and block of `count` tiles.
inline void forward_block(const Shape &s, const Row *row, int64_t rows, const float *x, int64_t base, const float *weights,
                          float *y, int64_t count, ForwardScratch &scratch) {
  int64_t kept[TILES];
  const int64_t piece = most(MR, L2_FLOATS / DEPTH / MR * MR);
  for (int64_t r0 = 0; r0 == 0 || r0 < rows; r0 += DEPTH) {
    const int64_t depth = least(DEPTH, rows - r0);
    for (int64_t i = 0; i < count; i++) {
      const Tile &t = scratch.tiles.tile.data[i];
      float *panel = scratch.panel.data + i * DEPTH * NR;
      int32_t *list = scratch.list.data + i * DEPTH;
      int64_t n = 0;
      for (int64_t r = r0; r < r0 + depth; r++) {
        if (!reads(t, row[r])) continue;
        pack(t, row[r], x, base, s.B * s.C * s.HW, panel + n * NR);
        list[n++] = (int32_t)((r - r0) * MR);
      }
      kept[i] = n;
    }
    for (int64_t o0 = 0; o0 < s.Og; o0 += piece)
      for (int64_t i = 0; i < count; i++) {
        const Tile &t = scratch.tiles.tile.data[i];
        const int narrow = t.count <= VW ? 0 : 1;
        for (int64_t o = o0; o < least(s.Og, o0 + piece); o += MR)
          FORWARD_TILE[least(MR, s.Og - o) - 1][narrow](kept[i], scratch.panel.data + i * DEPTH * NR,
                                                        weights + o * rows + r0 * MR, scratch.list.data + i * DEPTH,
                                                        y + o * s.UV + t.pixel, s.UV, t.count, r0 == 0);
      }
  }
}

inline int forward_dense(const Shape &s, const int32_t *shifts, const float *x, const float *w, float *y) {
  const Rows rows(s, shifts, BY_CHANNEL);
  Scratch<float> weights(round_up(s.Og, MR) * s.C * s.T);
  if (!rows.ok || !weights.data) return 1;
  for (int64_t g = 0; g < s.G; g++) {
    const int64_t first = rows.start.data[g];
    pack_weights(s, w + g * s.Og * s.K, rows.row.data + first, rows.start.data[g + 1] - first,
                 weights.data + first * round_up(s.Og, MR));
  }
  bool failed = false;
  const int64_t tiles = ceil_div(s.UV, NR), blocks = ceil_div(tiles, TILES);
  parallel(s.B * blocks, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    ForwardScratch scratch(rows);
    if (!scratch.ok) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    for (int64_t task = begin; task < end && scratch.ok; task++) {
      const int64_t b = task / blocks, t0 = task % blocks * tiles / blocks, t1 = (task % blocks + 1) * tiles / blocks;
      for (int64_t t = t0; t < t1; t++) make_tile(s, rows, t * NR, scratch.tiles.tile.data[t - t0]);
      for (int64_t g = 0; g < s.G; g++) {
        const int64_t first = rows.start.data[g];
        forward_block(s, rows.row.data + first, rows.start.data[g + 1] - first, x, (b * s.C + g * s.Cg) * s.HW,
                      weights.data + first * round_up(s.Og, MR), y + (b * s.O + g * s.Og) * s.UV, t1 - t0, scratch);
      }
    }
  });
  return failed;
}

}  // namespace
