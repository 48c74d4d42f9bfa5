// Depthwise: a plane at a time is copied into a zero border, so that no tap needs a mask, and stays in the first cache.
#pragma once
#include "taps.h"
#include "transpose.h"

namespace {

WIDERF_INLINE void copy_row(const float *from, float *to, int64_t width) {
  if (width < VW) {
    for (int64_t x = 0; x < width; x++) to[x] = from[x];
    return;
  }
  for (int64_t x = 0; x < width - VW; x += VW) store(to + x, load(from + x));
  store(to + width - VW, load(from + width - VW));
}

// A plane with a border, split by stride into phases, so that each tap reads neighbours for neighbouring outputs.
struct Bordered {
  int64_t top, left, rows, pitch, phases_y, phases_x, height, width;

  int64_t floats() const { return phases_y * phases_x * rows * pitch + 2 * VW; }
  // Where pixel (y, x) is; it may lie in the border.
  int64_t at(int64_t y, int64_t x) const {
    y += top, x += left;
    if (phases_y * phases_x == 1) return y * pitch + x;  // a division takes as long as twenty products
    return ((y % phases_y * phases_x + x % phases_x) * rows + y / phases_y) * pitch + x / phases_x;
  }
  // Image rows that the first `done` of `all` rows of outputs read.
  int64_t needed(int64_t done, int64_t all) const {
    return most(0, least(height, (rows - all + done) * phases_y - top));
  }
  // Brings the rows that a band of outputs reads to the first cache: taps jump about too much for the processor to foresee.
  void prefetch(const float *copy, int64_t u, int64_t count, int64_t all) const {
    if (phases_y * phases_x > 1) return;
    const float *from = copy + u * pitch;
    for (int64_t i = 0; i < (rows - all + count) * pitch; i += LINE) __builtin_prefetch(from + i);
  }
  void fill(const float *from, float *to) const {
    for (int64_t y = 0; y < height; y++, from += width) {
      if (phases_x == 1) {
        copy_row(from, to + at(y, 0), width);
        continue;
      }
      for (int64_t x = 0; x < width; x++) to[at(y, x)] = from[x];
    }
  }
};

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

// The taps of each channel that read the image for some output, by the phase of the stride that they belong to.
struct LiveTaps {
  int64_t taps, phases;
  Scratch<int64_t> at, tap, count;  // where in the plane it reads; its index among all weights; how many there are
  Scratch<float> weight;
  bool ok;

  // place(shift, &at) returns the phase, or −1 if no pixel has it. `w` may be null: then there are no weights.
  template <class F>
  LiveTaps(const Shape &s, const int32_t *shifts, const float *w, int64_t phases, const F &place)
      : taps(s.T), phases(phases), at(s.C * phases * s.T), tap(s.C * phases * s.T), count(s.C * phases),
        weight(w ? s.C * phases * s.T : 0), ok(at.data && tap.data && count.data && weight.data) {
    if (!ok) return;
    memset(count.data, 0, (size_t)(s.C * phases) * sizeof(int64_t));
    for (int64_t k = 0; k < s.C * s.T; k++) {
      const int32_t *d = shifts + 2 * k;
      if (!alive(s, d)) continue;
      int64_t where = 0;
      const int64_t phase = place(d, &where);
      if (phase < 0) continue;
      const int64_t list = k / s.T * phases + phase, i = list * s.T + count.data[list]++;
      at.data[i] = where;
      tap.data[i] = k;
      if (w) weight.data[i] = w[k];
    }
  }
  int64_t list(int64_t channel, int64_t phase = 0) const { return channel * phases + phase; }
};

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
    if (A == 1 && width < VW) {
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

// y[u][v] = sum over the taps of a list of weight · x[at + u·pitch + v], height × width outputs.
inline void conv_plane(const float *x, int64_t pitch, int64_t height, int64_t width, const LiveTaps &live, int64_t list,
                       float *y, int64_t step) {
  const float *w = live.weight.data + list * live.taps;
  const int64_t *at = live.at.data + list * live.taps, taps = live.count.data[list];
  const int64_t stripes = ceil_div(width, 8 * VW);
  int64_t v = 0;
  for (int64_t i = 0; i < stripes; i++) {
    const int64_t vectors = ceil_div(ceil_div(width - v, VW), stripes - i), wide = least(width - v, vectors * VW);
    STRIPE[vectors - 1](x + v, pitch, wide, height, w, at, taps, y + v, step);
    v += wide;
  }
}

// Reads and writes planes of either layout, a few channels at a time.
struct Planes {
  int64_t channels, height, width;
  bool last, stream;
  Planes(int64_t batch, int64_t channels, int64_t height, int64_t width, bool last)
      : channels(channels), height(height), width(width), last(last),
        stream(batch * channels * height * width >= STREAM_FLOATS) {}

  // Copies rows y … end − 1 of `n` channels of a sample into borders `step` apart. `line` holds n rows of the image.
  void read(const float *image, int64_t sample, int64_t channel, int64_t n, int64_t y, int64_t end, const Bordered &to,
            int64_t step, float *copy, float *line) const {
    if (!last) {
      to.fill(image + (sample * channels + channel) * height * width, copy);
      return;
    }
    for (; y < end; y++) {
      const float *from = image + (sample * height + y) * width * channels + channel;
      // The lines of later rows are far apart: no processor foresees them.
      for (int64_t x = 0; y + 4 < height && x < width; x++) __builtin_prefetch(from + (4 * width + x) * channels);
      if (to.phases_x == 1) {
        transpose<false>(from, channels, copy + to.at(y, 0), step, width, n);
        continue;
      }
      transpose<false>(from, channels, line, width, width, n);
      for (int64_t i = 0; i < n; i++)
        for (int64_t x = 0; x < width; x++) copy[i * step + to.at(y, x)] = line[i * width + x];
    }
  }

  // Where plane rows from y on go: the image itself, or a buffer that `write` transposes.
  float *target(float *image, int64_t sample, int64_t channel, int64_t y, float *buffer) const {
    return last ? buffer : image + ((sample * channels + channel) * height + y) * width;
  }
  void write(float *image, int64_t sample, int64_t channel, int64_t n, int64_t y, int64_t rows, const float *buffer) const {
    if (!last) return;
    float *to = image + (sample * height + y) * width * channels + channel;
    if (stream && (uintptr_t)to % 16 == 0 && channels % 4 == 0)
      transpose<true>(buffer, rows * width, to, channels, n, rows * width);
    else
      transpose<false>(buffer, rows * width, to, channels, n, rows * width);
  }
};

constexpr int64_t PLANES_FLOATS = 120000;  // copies of planes that fit the second cache beside the rest
constexpr int64_t BAND = 16;              // rows of output between two transpositions

// Channels computed together: one plane, or a cache line of channels_last if their copies fit the second cache.
inline int64_t together(const Shape &s, const Bordered &plane) {
  int64_t n = s.last ? LINE : 1;
  while (n > 4 && n * plane.floats() > PLANES_FLOATS) n /= 2;
  return least(n, s.C);
}

inline int forward_depthwise(const Shape &s, const int32_t *shifts, const float *x, const float *w, float *y) {
  const Bordered plane = border(s, shifts);
  const Planes in(s.B, s.C, s.H, s.W, s.last), out(s.B, s.C, s.U, s.V, s.last);
  const int64_t width = together(s, plane), step = plane.floats(), band = s.last ? least(BAND, s.U) : s.U;
  const LiveTaps live(s, shifts, w, 1, [&](const int32_t *d, int64_t *at) { return *at = plane.at(d[0], d[1]), 0; });
  bool failed = !live.ok;
  const int64_t blocks = ceil_div(s.C, width);
  if (!failed) parallel(blocks * s.B, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<float> copy(width * step), line(width * s.W), buffer(s.last ? width * band * s.V : 0);
    if (!copy.data || !line.data || !buffer.data) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    memset(copy.data, 0, (size_t)(width * step) * sizeof(float));
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / blocks, c0 = task % blocks * width, n = least(width, s.C - c0);
      for (int64_t u = 0, read = 0; u < s.U; u += band) {
        const int64_t rows = least(band, s.U - u), need = plane.needed(u + rows, s.U);
        in.read(x, b, c0, n, read, need, plane, step, copy.data, line.data);
        for (int64_t i = 0; i < n; i++) {
          if (i + 1 < n) plane.prefetch(copy.data + (i + 1) * step, u, rows, s.U);
          conv_plane(copy.data + i * step + u * plane.pitch, plane.pitch, rows, s.V, live, live.list(c0 + i),
                     out.target(y, b, c0, u, buffer.data + i * rows * s.V), s.V);
        }
        out.write(y, b, c0, n, u, rows, buffer.data);
        read = most(read, need);
      }
    }
    stream_end();
  });
  return failed;
}

}  // namespace
