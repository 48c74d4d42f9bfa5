// Runs the CPU kernels on random layers in memory of exactly the size they are promised, and compares with plain loops.
// Built by test_kernels_cpu.py with the sanitizers, which stop at the first access outside it.
#include <math.h>
#include <stdio.h>

#include KERNELS

static uint64_t state;
static int64_t draw(int64_t n) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int64_t)((state >> 33) % (uint64_t)n);
}
static float *numbers(int64_t n, bool random) {
  float *p = (float *)malloc((size_t)n * sizeof(float));
  for (int64_t i = 0; i < n; i++) p[i] = random ? (float)draw(2001) / 1000 - 1 : NAN;
  return p;
}

struct Layer {
  widerf_problem p;
  int32_t *shifts;
  float *x, *w, *g;
  double *y, *gx, *gw;

  int64_t at(int64_t b, int64_t c, int64_t v, int64_t h, int64_t channels, int64_t height, int64_t width) const {
    return p.channels_last ? ((b * height + v) * width + h) * channels + c : ((b * channels + c) * height + v) * width + h;
  }

  void twin() {
    const int64_t per_in = p.in_channels / p.groups, per_out = p.out_channels / p.groups;
    for (int64_t b = 0; b < p.batch; b++)
      for (int64_t o = 0; o < p.out_channels; o++)
        for (int64_t c = 0; c < per_in; c++)
          for (int64_t t = 0; t < p.taps; t++)
            for (int64_t u = 0; u < p.out_height; u++)
              for (int64_t v = 0; v < p.out_width; v++) {
                const int64_t channel = o / per_out * per_in + c, k = (o * per_in + c) * p.taps + t;
                const int32_t *d = shifts + 2 * (channel * p.taps + t);
                const int64_t row = p.stride_y * u + d[0], column = p.stride_x * v + d[1];
                if (row < 0 || row >= p.height || column < 0 || column >= p.width) continue;
                const int64_t from = at(b, channel, row, column, p.in_channels, p.height, p.width);
                const int64_t to = at(b, o, u, v, p.out_channels, p.out_height, p.out_width);
                y[to] += (double)w[k] * x[from];
                gx[from] += (double)w[k] * g[to];
                gw[k] += (double)g[to] * x[from];
              }
  }
};

static bool close(const char *name, int64_t seed, const double *exact, const float *found, int64_t n) {
  double largest = 0, error = 0;
  for (int64_t i = 0; i < n; i++) {
    const double difference = exact[i] - (double)found[i], size = exact[i] < 0 ? -exact[i] : exact[i];
    if (size > largest) largest = size;
    if (!(difference * difference <= error * error)) error = difference;
  }
  if (error * error <= 1e-10 * largest * largest) return true;
  printf("%s of layer %lld: error %g of %g\n", name, (long long)seed, error, largest);
  return false;
}

static bool check(int64_t seed) {
  state = (uint64_t)seed;
  Layer l;
  const bool runs = draw(3) == 0, depthwise = runs && draw(2);  // of channels that share their taps
  const int64_t wide = runs ? (16 + draw(26)) * (1 + draw(2)) : 1;
  const int64_t groups = depthwise ? wide : runs || draw(3) ? 1 : 1 + draw(17);
  const int64_t per_in = depthwise ? 1 : runs ? wide : groups > 6 ? 1 : 1 + draw(9);
  const int64_t per_out = depthwise || (groups > 6 && draw(3)) ? 1 : 1 + draw(40), reach = 1 + draw(20);
  l.p = {draw(4), groups * per_in, groups * per_out, groups, 1 + draw(30), 1 + draw(40), 0, 0, 1 + draw(12),
         1 + draw(3) / 2 + draw(2), 1 + draw(2), runs || draw(3) == 0, 1 + draw(3)};
  const bool same = draw(2);
  if (same) l.p.stride_y = l.p.stride_x = 1;
  l.p.out_height = same ? l.p.height : 1 + draw(20);
  l.p.out_width = same ? l.p.width : 1 + draw(40);
  const int64_t in = l.p.batch * l.p.in_channels * l.p.height * l.p.width, weights = l.p.out_channels * per_in * l.p.taps;
  const int64_t out = l.p.batch * l.p.out_channels * l.p.out_height * l.p.out_width, rows = l.p.in_channels * l.p.taps;
  l.shifts = (int32_t *)malloc((size_t)rows * 8);
  for (int64_t i = 0; i < 2 * rows; i++) l.shifts[i] = (int32_t)(draw(50) ? draw(2 * reach + 1) - reach : draw(1 << 30) - (1 << 29));
  const int64_t same_taps = wide % 2 == 0 && wide >= 32 ? wide / 2 : wide;  // one run or two
  for (int64_t c = 0; runs && c < wide; c++)
    memcpy(l.shifts + 2 * c * l.p.taps, l.shifts + 2 * (c / same_taps * same_taps) * l.p.taps, (size_t)l.p.taps * 8);
  l.x = numbers(in, true), l.w = numbers(weights, true), l.g = numbers(out, true);
  l.y = (double *)calloc((size_t)out, 8), l.gx = (double *)calloc((size_t)in, 8), l.gw = (double *)calloc((size_t)weights, 8);
  l.twin();
  float *y = numbers(out, false), *gx = numbers(in, false), *gw = numbers(weights, false);
  bool good = !widerf_forward(&l.p, l.shifts, l.x, l.w, y) && !widerf_grad_input(&l.p, l.shifts, l.g, l.w, gx) &&
              !widerf_grad_weight(&l.p, l.shifts, l.x, l.g, gw);
  good = good && close("y", seed, l.y, y, out) && close("grad_x", seed, l.gx, gx, in) && close("grad_w", seed, l.gw, gw, weights);
  void *all[] = {l.shifts, l.x, l.w, l.g, l.y, l.gx, l.gw, y, gx, gw};
  for (void *p : all) free(p);
  return good;
}

int main(int count, char **arguments) {
  const int64_t layers = count > 1 ? atoll(arguments[1]) : 100;
  for (int64_t seed = 1; seed <= layers; seed++)
    if (!check(seed)) return 1;
  printf("%lld layers\n", (long long)layers);
  return 0;
}
