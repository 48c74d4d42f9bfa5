// The three functions of the interface, for the vector width that the including file sets.
#pragma once
#include "blocks_depthwise.h"
#include "blocks_weight.h"
#include "depthwise_backward.h"
#include "grad_input.h"
#include "grad_weight.h"

namespace {

constexpr int64_t SLAB_FLOATS = 1 << 18;  // of the larger image: what the last cache holds easily
constexpr int64_t MOST_BORDER = 16, FEW_FLOATS = 1 << 20, MOST_LISTED = 1 << 24;

// Whether the plane at a time serves. Strides and taps about as wide as the image or wider would make its border or its
// lists of taps many times larger than the image; the general code needs neither.
bool depthwise(const widerf_problem *p, const int32_t *shifts) {
  if (p->groups != p->in_channels || p->groups != p->out_channels) return false;
  const Shape s(p);
  const int64_t lists = s.C * s.T * least(s.sy, s.H) * least(s.sx, s.W);
  return lists <= MOST_LISTED && border(s, shifts).floats() <= most(FEW_FLOATS, MOST_BORDER * (s.HW + s.UV));
}

int forward_planes(const widerf_problem *p, const int32_t *shifts, const float *x, const float *w, float *y) {
  const Shape s(p);
  return depthwise(p, shifts) ? forward_depthwise(s, shifts, x, w, y) : forward_dense(s, shifts, x, w, y);
}

int grad_input_planes(const widerf_problem *p, const int32_t *shifts, const float *g, const float *w, float *gx) {
  const Shape s(p);
  return depthwise(p, shifts) ? grad_input_depthwise(s, shifts, g, w, gx) : grad_input_dense(s, shifts, g, w, gx);
}

int grad_weight_planes(const widerf_problem *p, const int32_t *shifts, const float *x, const float *g, float *gw) {
  const Shape s(p);
  return depthwise(p, shifts) ? grad_weight_depthwise(s, shifts, x, g, gw) : grad_weight_dense(s, shifts, x, g, gw);
}

int64_t input_floats(const widerf_problem *p) { return p->in_channels * p->height * p->width; }
int64_t output_floats(const widerf_problem *p) { return p->out_channels * p->out_height * p->out_width; }

// channels_last where channels do not share their taps by runs: a few samples at a time become planes, and the result is
// transposed back. Calls f(part, first sample, planes of x, planes of y).
template <class F>
int by_slabs(const widerf_problem *p, const float *x, const float *y, const F &f) {
  const int64_t each = most(input_floats(p), output_floats(p)), threads = most(1, p->threads);
  const int64_t slab = least(p->batch, round_up(most(1, SLAB_FLOATS / each), threads));
  Scratch<float> a(slab * input_floats(p)), b(slab * output_floats(p));
  if (!a.data || !b.data) return 1;
  for (int64_t b0 = 0; b0 < p->batch; b0 += slab) {
    widerf_problem part = *p;
    part.batch = least(slab, p->batch - b0);
    part.channels_last = 0;
    const Shape s(&part);
    if (x) to_planes(x + b0 * input_floats(p), a.data, part.batch, s.HW, s.C, s.threads);
    if (y) to_planes(y + b0 * output_floats(p), b.data, part.batch, s.UV, s.O, s.threads);
    if (f(part, b0, a.data, b.data)) return 1;
  }
  return 0;
}

// Whether there is nothing to sum.
bool empty(const widerf_problem *p) {
  return p->batch < 1 || p->taps < 1 || input_floats(p) < 1 || output_floats(p) < 1;
}

void zero(float *to, int64_t floats) {
  if (floats > 0) memset(to, 0, (size_t)floats * sizeof(float));
}

}  // namespace

#if defined(_WIN32)
#define WIDERF_EXPORT __declspec(dllexport)
#else
#define WIDERF_EXPORT __attribute__((visibility("default")))
#endif

WIDERF_EXPORT int widerf_forward(const widerf_problem *p, const int32_t *shifts, const float *x, const float *w, float *y) {
  if (empty(p)) return zero(y, p->batch * output_floats(p)), 0;
  if (const Shape s(p); in_runs(s, shifts))
    return s.G > 1 ? depthwise_runs(s, onward(s), shifts, x, w, y) : forward_runs(s, shifts, x, w, y);
  if (!p->channels_last || depthwise(p, shifts)) return forward_planes(p, shifts, x, w, y);
  return by_slabs(p, x, nullptr, [&](const widerf_problem &part, int64_t b, float *in, float *out) {
    if (forward_planes(&part, shifts, in, w, out)) return 1;
    const Shape s(&part);
    from_planes(out, y + b * output_floats(p), part.batch, s.UV, s.O, s.threads);
    return 0;
  });
}

WIDERF_EXPORT int widerf_grad_input(const widerf_problem *p, const int32_t *shifts, const float *grad_y, const float *w,
                                    float *grad_x) {
  if (empty(p)) return zero(grad_x, p->batch * input_floats(p)), 0;
  if (const Shape s(p); in_runs(s, shifts))
    return s.G > 1 ? depthwise_runs(s, back(s), shifts, grad_y, w, grad_x) : grad_input_runs(s, shifts, grad_y, w, grad_x);
  if (!p->channels_last || depthwise(p, shifts)) return grad_input_planes(p, shifts, grad_y, w, grad_x);
  return by_slabs(p, nullptr, grad_y, [&](const widerf_problem &part, int64_t b, float *in, float *out) {
    if (grad_input_planes(&part, shifts, out, w, in)) return 1;
    const Shape s(&part);
    from_planes(in, grad_x + b * input_floats(p), part.batch, s.HW, s.C, s.threads);
    return 0;
  });
}

WIDERF_EXPORT int widerf_grad_weight(const widerf_problem *p, const int32_t *shifts, const float *x, const float *grad_y,
                                     float *grad_w) {
  const int64_t weights = p->groups > 0 ? p->out_channels * (p->in_channels / p->groups) * p->taps : 0;
  if (empty(p)) return zero(grad_w, weights), 0;
  if (const Shape s(p); in_runs(s, shifts))
    return s.G > 1 ? depthwise_runs_weight(s, shifts, x, grad_y, grad_w) : grad_weight_runs(s, shifts, x, grad_y, grad_w);
  if (!p->channels_last || depthwise(p, shifts)) return grad_weight_planes(p, shifts, x, grad_y, grad_w);
  Scratch<float> part_w(weights);
  if (!part_w.data) return 1;
  zero(grad_w, weights);
  return by_slabs(p, x, grad_y, [&](const widerf_problem &part, int64_t, float *in, float *out) {
    if (grad_weight_planes(&part, shifts, in, out, part_w.data)) return 1;
    for (int64_t i = 0; i < weights; i++) grad_w[i] += part_w.data[i];
    return 0;
  });
}
