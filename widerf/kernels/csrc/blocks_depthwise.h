// Depthwise layers in channels_last whose neighbouring channels share their taps: the lanes are channels.
#pragma once
#include "blocks.h"

namespace {

constexpr int DW = 2;                                      // vectors of channels side by side
constexpr int DM = WIDERF_VECTOR_BYTES == 64 ? 8 : 4;      // pixels of a register tile
constexpr int64_t ROWS_TOGETHER = 2;                       // rows of results between two pieces of the channels

// What a tap reads for the pixels 0, 1, … of a line of results: of those in [low, high), at + pixel · step.
struct Reading {
  int64_t at, low, high, tap;
};

// Channels computed together: `vectors` of them, the second from `second` on, may repeat lanes of the first or of the
// piece before; its own begin at `own`.
struct Channels {
  int64_t run, start, end, own, vectors, second;
};

// All channels in pieces of up to DW vectors.
struct ChannelPieces {
  Scratch<Channels> piece;
  int64_t count;
  ChannelPieces(const Shape &s, const int32_t *shifts) : piece(ceil_div(s.C, VW) + s.C / LEAST_RUN + 1), count(0) {
    if (!piece.data) return;
    for (int64_t c = 0, end, run = 0; c < s.C; c = end, run++) {
      end = run_end(s, shifts, c);
      for (int64_t own = c; own < end; own += DW * VW) {
        const int64_t stop = least(end, own + DW * VW), start = least(own, stop - VW);
        piece.data[count++] = {run, start, stop, own, stop - start > VW ? 2 : 1, stop - start - VW};
      }
    }
  }
};

// The lines of results of a way: one each row, and as many more as pixels are skipped between them. What the taps of
// each run read is worked out once: a line takes no longer than finding it for each.
struct Lines {
  struct Tap {
    Span rows;
    int64_t phase, count;  // `count` of the run's first: how many of its taps read anything
    Reading reading;       // for the first row
  };
  const Way way;
  const int64_t taps, phases;
  Scratch<Tap> tap;

  Lines(const Way &way, const Shape &s, const int32_t *shifts)
      : way(way), taps(s.T), phases(least(way.down_x, way.width)), tap(s.C / LEAST_RUN * s.T) {
    if (!tap.data) return;
    for (int64_t c = 0, run = 0; c < s.C; c = run_end(s, shifts, c), run++) {
      Tap *of = tap.data + run * s.T;
      int64_t n = 0;
      for (int64_t t = 0; t < s.T; t++) {
        const int32_t *d = shifts + 2 * (c * s.T + t);
        const Span rows = way.rows(d, 0, way.height), columns = way.columns(d, 0, way.width);
        if (!rows.count || !columns.count) continue;
        const int64_t low = columns.first / way.down_x, at = way.pixel(0, rows.from, columns.from) - low * step();
        of[n++] = {rows, columns.first % way.down_x, 0, {at, low, low + columns.count, t}};
      }
      of[0].count = n;
    }
  }
  int64_t bands() const { return ceil_div(way.height, ROWS_TOGETHER); }
  int64_t step() const { return way.up_x * way.from_channels; }

  // What the taps of a run read for row y of a sample; returns how many read anything.
  int64_t read(int64_t run, int64_t sample, int64_t y, int64_t phase, Reading *to) const {
    const Tap *of = tap.data + run * taps;
    int64_t n = 0;
    for (int64_t i = 0, count = of[0].count; i < count; i++) {
      const int64_t k = floor_div(y - of[i].rows.first, way.down_y);
      if (k < 0 || k >= of[i].rows.count || of[i].rows.first + k * way.down_y != y || of[i].phase != phase) continue;
      to[n] = of[i].reading;
      to[n++].at += way.pixel(sample, k * way.up_y, 0);
    }
    return n;
  }

  // Calls f(result pixel, i, m, count) for the tiles of a piece in a band of rows, counted through all samples: m pixels of
  // a line from the i-th on, which `count` taps in `to` read.
  template <class F>
  void tiles(const Channels &piece, int64_t band, Reading *to, const F &f) const {
    const int64_t sample = band / bands(), y0 = band % bands() * ROWS_TOGETHER;
    for (int64_t y = y0; y < least(way.height, y0 + ROWS_TOGETHER); y++)
      for (int64_t phase = 0; phase < phases; phase++) {
        const int64_t count = read(piece.run, sample, y, phase, to);
        const int64_t pixels = ceil_div(way.width - phase, way.down_x), tiles = ceil_div(pixels, DM);
        for (int64_t k = 0; k < tiles; k++) {
          const int64_t i = pixels * k / tiles, m = pixels * (k + 1) / tiles - i;
          f((sample * way.height + y) * way.width + phase + i * way.down_x, i, m, count);
        }
      }
  }
};

// The tap's part of pixels i … i + M − 1: calls f(m, where it reads). Pixels outside read zeros.
template <int M, class F>
WIDERF_INLINE void each_pixel(const Reading &r, int64_t i, const float *image, int64_t step, const float *zeros, const F &f) {
  if (r.low <= i && i + M <= r.high) {
    const float *from = image + r.at + i * step;
    WIDERF_UNROLL
    for (int m = 0; m < M; m++) f(m, from + m * step);
    return;
  }
  WIDERF_UNROLL
  for (int m = 0; m < M; m++) f(m, r.low <= i + m && i + m < r.high ? image + r.at + (i + m) * step : zeros);
}

// M pixels of a line, N vectors: the weighted sum of what the taps read. `weights` has s.C of each tap.
template <int M, int N>
void line_tile(int64_t i, int64_t second, const Reading *taps, int64_t count, const float *image, int64_t step,
               const float *zeros, const float *weights, int64_t channels, float *to, int64_t to_step, bool past) {
  const int64_t lane[2] = {0, second};
  Vec sums[M][N];
  WIDERF_UNROLL
  for (int m = 0; m < M; m++)
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) sums[m][n] = splat<Vec>(0.0f);
  for (int64_t k = 0; k < count; k++) {
    if (taps[k].high <= i || taps[k].low >= i + M) continue;
    Vec w[N];
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) w[n] = load(weights + taps[k].tap * channels + lane[n]);
    each_pixel<M>(taps[k], i, image, step, zeros, [&](int m, const float *from) WIDERF_ALWAYS {
      WIDERF_UNROLL
      for (int n = 0; n < N; n++) sums[m][n] += w[n] * load(from + lane[n]);
    });
  }
  WIDERF_UNROLL
  for (int m = 0; m < M; m++)
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) {
      float *at = to + m * to_step + lane[n];
      past ? store_past(at, sums[m][n]) : store(at, sums[m][n]);
    }
}

typedef void (*LineTile)(int64_t, int64_t, const Reading *, int64_t, const float *, int64_t, const float *, const float *,
                         int64_t, float *, int64_t, bool);
#define WIDERF_BOTH(F, M) {F<M, 1>, F<M, DW>}
#define WIDERF_TILES(F) \
  {WIDERF_BOTH(F, 1), WIDERF_BOTH(F, 2), WIDERF_BOTH(F, 3), WIDERF_BOTH(F, 4), \
   WIDERF_BOTH(F, 5), WIDERF_BOTH(F, 6), WIDERF_BOTH(F, 7), WIDERF_BOTH(F, 8)}
const LineTile LINE_TILE[8][DW] = WIDERF_TILES(line_tile);

// Results of either way: y of x, or the input's gradient of the output's.
inline int depthwise_runs(const Shape &s, const Way &way, const int32_t *shifts, const float *from, const float *w, float *to) {
  const ChannelPieces pieces(s, shifts);
  const Lines lines(way, s, shifts);
  Scratch<float> weights(s.C * s.T);
  if (!pieces.piece.data || !lines.tap.data || !weights.data) return 1;
  transpose<false>(w, s.T, weights.data, s.C, s.C, s.T);
  const bool aligned = s.C % VW == 0 && (uintptr_t)to % sizeof(Vec) == 0;
  const bool large = s.B * way.height * way.width * s.C >= STREAM_FLOATS;
  bool failed = false;
  parallel(s.B * lines.bands(), s.threads, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<Reading> taps(s.T);
    const float zeros[DW * VW] = {};
    if (!taps.data) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    for (int64_t band = begin; band < end; band++)
      for (int64_t j = 0; j < pieces.count; j++) {
        const Channels &piece = pieces.piece.data[j];
        const bool past = large && aligned && piece.start % VW == 0 && piece.second % VW == 0;
        lines.tiles(piece, band, taps.data, [&](int64_t pixel, int64_t i, int64_t m, int64_t count) {
          LINE_TILE[m - 1][piece.vectors - 1](i, piece.second, taps.data, count, from + piece.start, lines.step(), zeros,
                                              weights.data + piece.start, s.C, to + pixel * s.C + piece.start,
                                              way.down_x * s.C, past);
        });
      }
    stream_end();
  });
  return failed;
}

// Adds to the sums of each tap what M pixels of a line give, N vectors; g is the gradient of the first.
template <int M, int N>
void products_tile(int64_t i, int64_t second, const Reading *taps, int64_t count, const float *image, int64_t step,
                   const float *zeros, const float *g, int64_t g_step, float *sums) {
  const int64_t lane[2] = {0, second};
  Vec up[M][N];
  WIDERF_UNROLL
  for (int m = 0; m < M; m++)
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) up[m][n] = load(g + m * g_step + lane[n]);
  for (int64_t k = 0; k < count; k++) {
    if (taps[k].high <= i || taps[k].low >= i + M) continue;
    Vec part[2][N];  // two, so that each waits less for the one before
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) part[0][n] = load(sums + (taps[k].tap * DW + n) * VW), part[1][n] = splat<Vec>(0.0f);
    each_pixel<M>(taps[k], i, image, step, zeros, [&](int m, const float *from) WIDERF_ALWAYS {
      WIDERF_UNROLL
      for (int n = 0; n < N; n++) part[m % 2][n] += up[m][n] * load(from + lane[n]);
    });
    WIDERF_UNROLL
    for (int n = 0; n < N; n++) store(sums + (taps[k].tap * DW + n) * VW, part[0][n] + part[1][n]);
  }
}

typedef void (*ProductsTile)(int64_t, int64_t, const Reading *, int64_t, const float *, int64_t, const float *,
                             const float *, int64_t, float *);
const ProductsTile PRODUCTS_TILE[8][DW] = WIDERF_TILES(products_tile);
#undef WIDERF_TILES
#undef WIDERF_BOTH

// Writes the sums of a piece, of the channels that are its own.
inline void write_sums(const Shape &s, const Channels &piece, const float *sums, float *gw) {
  for (int64_t t = 0; t < s.T; t++)
    for (int64_t c = piece.own; c < piece.end; c++) {
      const int64_t lane = c - piece.start;
      gw[c * s.T + t] = sums[t * DW * VW + (lane < VW ? lane : VW + lane - piece.second)];
    }
}

inline int depthwise_runs_weight(const Shape &s, const int32_t *shifts, const float *x, const float *g, float *gw) {
  const ChannelPieces pieces(s, shifts);
  const Lines lines(onward(s), s, shifts);
  if (!pieces.piece.data || !lines.tap.data) return 1;
  bool failed = false;
  // Each piece is one thread's, pixels in their order: how many threads there are does not change a bit.
  parallel(pieces.count, s.threads, [&](int64_t, int64_t begin, int64_t end) {
    const int64_t each = s.T * DW * VW;
    Scratch<Reading> taps(s.T);
    Scratch<float> sums((end - begin) * each);
    const float zeros[DW * VW] = {};
    if (!taps.data || !sums.data) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    memset(sums.data, 0, (size_t)((end - begin) * each) * sizeof(float));
    for (int64_t band = 0; band < s.B * lines.bands(); band++)
      for (int64_t j = begin; j < end; j++) {
        const Channels &piece = pieces.piece.data[j];
        lines.tiles(piece, band, taps.data, [&](int64_t pixel, int64_t i, int64_t m, int64_t count) {
          PRODUCTS_TILE[m - 1][piece.vectors - 1](i, piece.second, taps.data, count, x + piece.start, lines.step(), zeros,
                                                  g + pixel * s.C + piece.start, s.C, sums.data + (j - begin) * each);
        });
      }
    for (int64_t j = begin; j < end; j++) write_sums(s, pieces.piece.data[j], sums.data + (j - begin) * each, gw);
  });
  return failed;
}

}  // namespace
