// Gradient of the input: tiles of weightsᵀ · gradient, each row added to the image where its tap read.
#pragma once
#include "forward.h"

namespace {

// Adds the tile's sums to the pixels that the row reads. The caller owns `size` floats at `image`; a vector may run into
// the next row or channel and adds 0 there, never beyond.
template <int N>
WIDERF_INLINE void scatter(const Tile &t, const Row &r, const Vec *sums, float *image, int64_t base, int64_t size) {
  const int64_t at = base + r.offset + t.first;
  const int32_t *my = t.mask_y + (int64_t)r.y * NR, *mx = t.mask_x + (int64_t)r.x * NR;
  if (t.contiguous && at >= 0 && at + N * VW <= size) {
    float *to = image + at;
    const bool whole = t.y[r.y] == INSIDE && t.x[r.x] == INSIDE;
    for (int v = 0; v < N; v++) {
      const Vec part = whole ? sums[v] : keep(sums[v], load_mask(my + v * VW) & load_mask(mx + v * VW));
      store(to + v * VW, load(to + v * VW) + part);
    }
    return;
  }
  float lanes[N * VW];
  for (int v = 0; v < N; v++) store(lanes + v * VW, sums[v]);
  for (int i = 0; i < N * VW; i++)
    if (my[i] & mx[i]) image[at + t.at[i]] += lanes[i];
}

// `row[m]` says where the weights of row m go, `weights[m]` points to its Og weights.
template <int M, int N>
void grad_input_tile(int64_t depth, const float *panel, const float *const *weights, const Tile &t, const Row *const *row,
                     float *image, int64_t base, int64_t size) {
  Vec sums[M][N];
  const float *w[M];
  for (int m = 0; m < M; m++) {
    w[m] = weights[m];
    for (int v = 0; v < N; v++) sums[m][v] = splat<Vec>(0.0f);
  }
  for (int64_t o = 0; o < depth; o++) {
    Vec column[N];
    for (int v = 0; v < N; v++) column[v] = load(panel + o * NR + v * VW);
    for (int m = 0; m < M; m++) {
      const Vec factor = splat<Vec>(w[m][o]);
      for (int v = 0; v < N; v++) sums[m][v] += factor * column[v];
    }
  }
  for (int m = 0; m < M; m++) scatter<N>(t, *row[m], sums[m], image, base, size);
}

typedef void (*InputTile)(int64_t, const float *, const float *const *, const Tile &, const Row *const *, float *, int64_t,
                          int64_t);
const InputTile INPUT_TILE[MR][NV] = {{grad_input_tile<1, 1>, grad_input_tile<1, 2>}, {grad_input_tile<2, 1>, grad_input_tile<2, 2>},
                                      {grad_input_tile<3, 1>, grad_input_tile<3, 2>}, {grad_input_tile<4, 1>, grad_input_tile<4, 2>},
                                      {grad_input_tile<5, 1>, grad_input_tile<5, 2>}, {grad_input_tile<6, 1>, grad_input_tile<6, 2>}};

// Copies a tile of Og channels of g, 0 beyond the last pixel.
inline void pack_gradient(const Shape &s, const float *g, const Tile &t, float *to) {
  for (int64_t o = 0; o < s.Og; o++, to += NR) {
    const float *from = g + o * s.UV + t.pixel;
    if (t.count == NR) {
      for (int v = 0; v < NV; v++) store(to + v * VW, load(from + v * VW));
      continue;
    }
    for (int i = 0; i < NR; i++) to[i] = i < t.count ? from[i] : 0.0f;
  }
}

// One sample, one group, the rows of some of its channels, `size` floats from `image`; `base` is the group's first
// channel counted from there.
inline void grad_input_part(const Shape &s, const Rows &rows, const Row *row, int64_t count, const float *g,
                            const float *weights, float *image, int64_t base, int64_t size, Tiles &tiles, float *panel) {
  memset(image, 0, (size_t)size * sizeof(float));
  const int64_t piece = most(MR, L2_FLOATS / most(1, s.Og) / MR * MR), last = ceil_div(s.UV, NR);
  for (int64_t t0 = 0; t0 < last; t0 += TILES) {
    const int64_t width = least(TILES, last - t0);
    for (int64_t i = 0; i < width; i++) {
      make_tile(s, rows, (t0 + i) * NR, tiles.tile.data[i]);
      pack_gradient(s, g, tiles.tile.data[i], panel + i * s.Og * NR);
    }
    for (int64_t r0 = 0; r0 < count; r0 += piece) {
      const int64_t r1 = least(count, r0 + piece);
      for (int64_t i = 0; i < width; i++) {
        const Tile &t = tiles.tile.data[i];
        const int narrow = t.count <= VW ? 0 : 1;
        const Row *of[MR];
        const float *from[MR];
        int n = 0;
        for (int64_t r = r0; r < r1; r++) {
          if (reads(t, row[r])) {
            of[n] = row + r;
            from[n++] = weights + r * s.Og;
          }
          if (n == MR || (n && r + 1 == r1)) {
            INPUT_TILE[n - 1][narrow](s.Og, panel + i * s.Og * NR, from, t, of, image, base, size);
            n = 0;
          }
        }
      }
    }
  }
}

inline int grad_input_dense(const Shape &s, const int32_t *shifts, const float *g, const float *w, float *gx) {
  // One after the other, the rows of a tile belong to different channels: sums of neighbouring taps of one channel
  // would overlap in memory, and each would wait for the one before.
  const Rows rows(s, shifts, BY_TAP);
  const int64_t parts = s.B * s.G % s.threads == 0 || s.B * s.G >= 8 * s.threads ? 1 : least(s.Cg, s.threads);
  Scratch<float> weights(s.C * s.T * s.Og);
  Scratch<Row> mine(s.C * s.T);
  Scratch<int64_t> start(s.G * parts + 1);
  if (!rows.ok || !weights.data || !mine.data || !start.data) return 1;
  int64_t n = 0;
  for (int64_t j = 0; j < s.G * parts; j++) {
    const int64_t group = j / parts, c0 = j % parts * s.Cg / parts, c1 = (j % parts + 1) * s.Cg / parts;
    start.data[j] = n;
    for (int64_t r = rows.start.data[group]; r < rows.start.data[group + 1]; r++) {
      const Row &row = rows.row.data[r];
      if (row.k < c0 * s.T || row.k >= c1 * s.T) continue;
      for (int64_t o = 0; o < s.Og; o++) weights.data[n * s.Og + o] = w[(group * s.Og + o) * s.K + row.k];
      mine.data[n++] = row;
    }
  }
  start.data[s.G * parts] = n;
  bool failed = false;
  parallel(s.B * s.G * parts, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    Tiles tiles(rows, TILES);
    Scratch<float> panel(TILES * NR * s.Og);
    const bool ok = tiles.ok && panel.data;
    if (!ok) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    for (int64_t task = begin; task < end && ok; task++) {
      const int64_t b = task / (s.G * parts), j = task % (s.G * parts), group = j / parts;
      const int64_t c0 = j % parts * s.Cg / parts, c1 = (j % parts + 1) * s.Cg / parts, first = start.data[j];
      grad_input_part(s, rows, mine.data + first, start.data[j + 1] - first, g + (b * s.O + group * s.Og) * s.UV,
                      weights.data + first * s.Og, gx + (b * s.C + group * s.Cg + c0) * s.HW, -c0 * s.HW,
                      (c1 - c0) * s.HW, tiles, panel.data);
    }
  });
  return failed;
}

}  // namespace
