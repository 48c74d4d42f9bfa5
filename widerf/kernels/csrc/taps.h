// Which input pixel each tap reads for a tile of output pixels, and which of them lie outside the image.
#pragma once
#include "parallel.h"
#include "sparse_conv.h"

namespace {

struct Shape {
  int64_t B, C, O, G, H, W, U, V, T, sy, sx;  // U, V: output size
  int64_t Cg, Og, K, HW, UV;                  // per group; K = rows of the matrix of columns
  int64_t threads;
  bool last;  // channels_last
  explicit Shape(const widerf_problem *p)
      : B(p->batch), C(p->in_channels), O(p->out_channels), G(p->groups), H(p->height), W(p->width), U(p->out_height),
        V(p->out_width), T(p->taps), sy(p->stride_y), sx(p->stride_x), Cg(C / G), Og(O / G), K(Cg * T), HW(H * W),
        UV(U * V), threads(1), last(p->channels_last != 0) {
    threads = useful_threads((double)B * (double)O * (double)UV * (double)K, p->threads);
  }
};

// Whether a tap with this shift reads the image for some output.
inline bool alive(const Shape &s, const int32_t *d) {
  return d[0] >= -s.sy * (s.U - 1) && d[0] < s.H && d[1] >= -s.sx * (s.V - 1) && d[1] < s.W;
}

// One row of the matrix of columns: an input channel seen through one of its taps.
struct Row {
  int64_t offset;  // of the input pixel that output 0 reads, from the group's first channel; may lie outside
  int32_t k;       // c·T + t within the group
  int32_t y, x;    // index of the shift among the distinct shifts of its axis
};

enum Order { BY_CHANNEL, BY_TAP, BY_SHIFT };

// The rows that read the image for some output, group by group, and the distinct shifts of each axis, ascending.
struct Rows {
  Scratch<Row> row;
  Scratch<int64_t> start;  // group g owns rows start[g] … start[g+1] − 1
  Scratch<int32_t> ys, xs;
  int64_t ny, nx;
  bool ok;

  Rows(const Shape &s, const int32_t *shifts, Order order)
      : row(s.C * s.T), start(s.G + 1), ys(s.H + s.sy * s.U), xs(s.W + s.sx * s.V), ny(0), nx(0), ok(false) {
    // A tap that reads the image for some output has a shift in [−low, size).
    const int64_t low_y = s.sy * (s.U - 1), low_x = s.sx * (s.V - 1);
    Scratch<int32_t> at_y(s.H + low_y), at_x(s.W + low_x);
    if (!row.data || !start.data || !ys.data || !xs.data || !at_y.data || !at_x.data) return;
    memset(at_y.data, 0, (size_t)(s.H + low_y) * 4);
    memset(at_x.data, 0, (size_t)(s.W + low_x) * 4);
    for (int64_t k = 0; k < s.C * s.T; k++) {
      const int32_t *d = shifts + 2 * k;
      if (alive(s, d)) at_y.data[d[0] + low_y] = at_x.data[d[1] + low_x] = 1;
    }
    ny = number(at_y.data, s.H + low_y, low_y, ys.data);
    nx = number(at_x.data, s.W + low_x, low_x, xs.data);
    int64_t n = 0;
    auto add = [&](int64_t c, int64_t k, const int32_t *d) {
      row.data[n++] = {c * s.HW + d[0] * s.W + d[1], (int32_t)k, at_y.data[d[0] + low_y], at_x.data[d[1] + low_x]};
    };
    for (int64_t g = 0; g < s.G; g++) {
      start.data[g] = n;
      const int32_t *of_group = shifts + 2 * g * s.K;
      const int64_t passes = order == BY_SHIFT ? ny : 1;
      for (int64_t pass = 0; pass < passes; pass++) {
        for (int64_t i = 0; i < s.K; i++) {
          const int64_t k = order == BY_TAP ? i % s.Cg * s.T + i / s.Cg : i;
          const int32_t *d = of_group + 2 * k;
          if (alive(s, d) && (order != BY_SHIFT || d[0] == ys.data[pass])) add(k / s.T, k, d);
        }
      }
    }
    start.data[s.G] = n;
    ok = true;
  }

  static int64_t number(int32_t *used, int64_t size, int64_t low, int32_t *values) {
    int64_t n = 0;
    for (int64_t i = 0; i < size; i++) {
      if (!used[i]) continue;
      values[n] = (int32_t)(i - low);
      used[i] = (int32_t)n++;
    }
    return n;
  }
};

enum State : uint8_t { OUTSIDE, PARTLY, INSIDE };

// NR output pixels in a row of the flattened output, and what each shift makes of them.
struct Tile {
  int64_t pixel, count;   // first output pixel; how many there are (fewer than NR at the end)
  int64_t first;          // input offset that the first pixel reads at shift 0
  bool contiguous;        // the pixels read neighbouring inputs
  int64_t at[NR];         // input offsets from the first
  State *y, *x;           // per distinct shift
  int32_t *mask_y, *mask_x;  // per distinct shift, NR lanes: −1 inside, 0 outside
};

// Memory for the tiles of a block of pixels.
struct Tiles {
  Scratch<State> states;
  Scratch<int32_t> masks;
  Scratch<Tile> tile;
  bool ok;
  Tiles(const Rows &rows, int64_t count)
      : states(count * (rows.ny + rows.nx)), masks(count * (rows.ny + rows.nx) * NR), tile(count),
        ok(states.data && masks.data && tile.data) {
    if (!ok) return;
    for (int64_t i = 0; i < count; i++) {
      Tile &t = tile.data[i];
      t.y = states.data + i * (rows.ny + rows.nx);
      t.x = t.y + rows.ny;
      t.mask_y = masks.data + i * (rows.ny + rows.nx) * NR;
      t.mask_x = t.mask_y + rows.ny * NR;
    }
  }
};

inline void judge(const int32_t *place, int64_t count, int64_t size, const int32_t *shift, int64_t shifts, State *state,
                  int32_t *mask) {
  int32_t low = place[0], high = place[0];
  for (int64_t i = 1; i < count; i++) {
    low = (int32_t)least(low, place[i]);
    high = (int32_t)most(high, place[i]);
  }
  const IVec end = splat<IVec>((int32_t)size), zero = splat<IVec>(0);
  for (int64_t d = 0; d < shifts; d++) {
    const int64_t a = (int64_t)low + shift[d], b = (int64_t)high + shift[d];
    state[d] = b < 0 || a >= size ? OUTSIDE : a >= 0 && b < size && count == NR ? INSIDE : PARTLY;
    if (state[d] == OUTSIDE) continue;
    const IVec by = splat<IVec>(shift[d]);
    for (int v = 0; v < NV; v++) {
      const IVec q = load_mask(place + v * VW) + by;
      store_mask(mask + d * NR + v * VW, (IVec)(q >= zero) & (IVec)(q < end));
    }
  }
}

inline void make_tile(const Shape &s, const Rows &rows, int64_t pixel, Tile &t) {
  int32_t y[NR], x[NR];
  int64_t u = pixel / s.V, v = pixel % s.V;
  t.pixel = pixel;
  t.count = least(NR, s.UV - pixel);
  t.first = s.sy * u * s.W + s.sx * v;
  t.contiguous = true;
  for (int i = 0; i < NR; i++) {
    if (i >= t.count) {
      y[i] = x[i] = -(1 << 30);  // outside whatever the shift
      t.at[i] = 0;
      continue;
    }
    y[i] = (int32_t)(s.sy * u);
    x[i] = (int32_t)(s.sx * v);
    t.at[i] = s.sy * u * s.W + s.sx * v - t.first;
    t.contiguous = t.contiguous && t.at[i] == i;
    if (++v == s.V) v = 0, u++;
  }
  judge(y, t.count, s.H, rows.ys.data, rows.ny, t.y, t.mask_y);
  judge(x, t.count, s.W, rows.xs.data, rows.nx, t.x, t.mask_x);
}

WIDERF_INLINE bool reads(const Tile &t, const Row &r) { return t.y[r.y] != OUTSIDE && t.x[r.x] != OUTSIDE; }

// Writes what the row reads for the tile's pixels, 0 where that is outside. `image` holds `size` floats, the group's
// first channel at `base`. A load may touch neighbouring rows or channels, whose values are masked, never more.
WIDERF_INLINE void pack(const Tile &t, const Row &r, const float *image, int64_t base, int64_t size, float *to) {
  const int64_t at = base + r.offset + t.first;
  if (t.contiguous && at >= 0 && at + NR <= size) {
    const float *from = image + at;
    if (t.y[r.y] == INSIDE && t.x[r.x] == INSIDE) {
      for (int v = 0; v < NV; v++) store(to + v * VW, load(from + v * VW));
      return;
    }
    const int32_t *my = t.mask_y + (int64_t)r.y * NR, *mx = t.mask_x + (int64_t)r.x * NR;
    for (int v = 0; v < NV; v++)
      store(to + v * VW, keep(load(from + v * VW), load_mask(my + v * VW) & load_mask(mx + v * VW)));
    return;
  }
  const int32_t *my = t.mask_y + (int64_t)r.y * NR, *mx = t.mask_x + (int64_t)r.x * NR;
  for (int i = 0; i < NR; i++) to[i] = my[i] & mx[i] ? image[at + t.at[i]] : 0.0f;
}

}  // namespace
