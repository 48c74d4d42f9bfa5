// The C interface of the CPU kernels: raw pointers, no torch, one library per instruction set.
//
// Every function computes one of the three bilinear maps of a 2-D convolution with taps at any integer offsets,
//
//   y[b, o, u, v] = sum over c, t of  w[o, c, t] * x[b, c, sy*u + shifts[c][t][0], sx*v + shifts[c][t][1]],
//
// x zero outside the image; padding and dilation are folded into the shifts. With groups, output o reads the input
// channels of its block only and w is (out, in/groups, taps). All arrays are dense; x, y and their gradients are NCHW,
// or NHWC if channels_last is set. The functions return 0, or 1 if memory ran out (nothing is promised about the output then).
//
// Nothing is checked here: the caller (gate.py, cpu.py) sees to it that groups divide the channels, that all sizes are
// those of the arrays and not negative, that there are fewer than 2^31 taps of a group's channels together, and that on
// each axis size + stride · (output size) is at most 2^27.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t batch, in_channels, out_channels, groups;
  int64_t height, width, out_height, out_width;
  int64_t taps, stride_y, stride_x;
  int64_t channels_last, threads;
} widerf_problem;

int widerf_forward(const widerf_problem *p, const int32_t *shifts, const float *x, const float *w, float *y);
int widerf_grad_input(const widerf_problem *p, const int32_t *shifts, const float *grad_y, const float *w, float *grad_x);
int widerf_grad_weight(const widerf_problem *p, const int32_t *shifts, const float *x, const float *grad_y, float *grad_w);

#ifdef __cplusplus
}
#endif
