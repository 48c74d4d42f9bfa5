// channels_last, where neighbouring channels share their taps: the runs of channels that do, and the pixels that a tap
// joins. A pixel's channels lie side by side, so nothing is transposed, and what lies outside the image is left out.
#pragma once
#include "taps.h"
#include "transpose.h"

namespace {

constexpr int64_t LEAST_RUN = 16;  // of channels, below which planes are faster; no vector is wider
constexpr int64_t MOST_RUN = 256;  // longer ones are cut, so that sums over a chunk of pixels stay in the second cache

inline bool same_taps(const Shape &s, const int32_t *shifts, int64_t a, int64_t b) {
  return memcmp(shifts + 2 * a * s.T, shifts + 2 * b * s.T, (size_t)(2 * s.T) * sizeof(int32_t)) == 0;
}

// One past the last channel whose taps are those of channel c and all between.
inline int64_t run_end(const Shape &s, const int32_t *shifts, int64_t c) {
  int64_t end = c + 1;
  while (end < s.C && same_taps(s, shifts, c, end)) end++;
  return end;
}

// Whether the kernels for runs of channels serve.
inline bool in_runs(const Shape &s, const int32_t *shifts) {
  if (!s.last || (s.G > 1 && (s.G != s.C || s.G != s.O))) return false;
  for (int64_t c = 0, end; c < s.C; c = end) {
    end = run_end(s, shifts, c);
    if (end - c < LEAST_RUN) return false;
  }
  return true;
}

// Run i is channels start[i] … start[i + 1] − 1.
struct Runs {
  Scratch<int64_t> start;
  int64_t count;
  Runs(const Shape &s, const int32_t *shifts) : start(s.C / (LEAST_RUN / 2) + 2), count(0) {
    if (!start.data) return;
    for (int64_t c = 0, end; c < s.C; c = end) {
      end = run_end(s, shifts, c);
      const int64_t parts = ceil_div(end - c, MOST_RUN);
      for (int64_t i = 0; i < parts; i++) start.data[count++] = c + (end - c) * i / parts;
    }
    start.data[count] = s.C;
  }
  int64_t width(int64_t i) const { return start.data[i + 1] - start.data[i]; }
};

// Result pixels first, first + down, … (count of them) read pixels from, from + up, … of the other image.
struct Span {
  int64_t first, count, from;
};

// Of an axis, the pixels begin … end − 1 of the result for which (up·pixel + shift)/down is a whole number in [0, size).
// Either `up` or `down` is 1.
inline Span span(int64_t up, int64_t down, int64_t shift, int64_t size, int64_t begin, int64_t end) {
  int64_t first = most(begin, down == 1 ? -floor_div(shift, up) : -shift);
  if (down > 1) first += (down - (first + shift) % down) % down;
  const int64_t stop = least(end, floor_div((size - 1) * down - shift, up) + 1);
  if (stop <= first) return {begin, 0, 0};
  return {first, ceil_div(stop - first, down), (up * first + shift) / down};
}

// Which pixels of `height` × `width` results read which of from_height × from_width: outputs the input, or, for its
// gradient, inputs the output's gradient.
struct Way {
  int64_t sign, up_y, up_x, down_y, down_x, height, width, from_height, from_width, from_channels;

  Span rows(const int32_t *d, int64_t begin, int64_t end) const {
    return span(up_y, down_y, sign * d[0], from_height, begin, end);
  }
  Span columns(const int32_t *d, int64_t begin, int64_t end) const {
    return span(up_x, down_x, sign * d[1], from_width, begin, end);
  }
  int64_t pixel(int64_t sample, int64_t row, int64_t column) const {  // where its channels begin
    return ((sample * from_height + row) * from_width + column) * from_channels;
  }
};

inline Way onward(const Shape &s) { return {1, s.sy, s.sx, 1, 1, s.U, s.V, s.H, s.W, s.C}; }
inline Way back(const Shape &s) { return {-1, 1, 1, s.sy, s.sx, s.H, s.W, s.U, s.V, s.O}; }

// Pixels of a chunk that a tap joins with one inside the image.
struct Pairs {
  Scratch<const float *> from;
  Scratch<float *> to;
  int64_t count;
  explicit Pairs(int64_t pixels) : from(pixels), to(pixels), count(0) {}
  bool ok() const { return from.data && to.data; }

  // Of pixels begin … end − 1, all samples in a row, by the tap d; pixel p's result is at to_[(p − begin)·step].
  void fill(const Way &way, const int32_t *d, const float *image, int64_t begin, int64_t end, float *to_, int64_t step) {
    int64_t sample = begin / (way.height * way.width), y = begin / way.width % way.height, x = begin % way.width;
    count = 0;
    for (int64_t p = begin; p < end;) {
      const int64_t stop = least(way.width, x + end - p);
      const Span row = way.rows(d, y, y + 1), column = way.columns(d, x, stop);
      if (row.count) {
        const float *at = image + way.pixel(sample, row.from, column.from);
        float *result = to_ + (p - begin + column.first - x) * step;
        for (int64_t i = 0; i < column.count; i++) {
          from.data[count] = at + i * way.up_x * way.from_channels;
          to.data[count++] = result + i * way.down_x * step;
        }
      }
      p += stop - x;
      x = 0;
      if (++y == way.height) y = 0, sample++;
    }
  }
};

}  // namespace
