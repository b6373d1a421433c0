// SPDX-License-Identifier: Apache-2.0
// Depthwise atrous convolution with stride 1, and the gradient of its weight:
//
//   out(c, y, x) = bias[c] + sum over (i, j) of
//                  weight[c][i][j] x(c, y + i * dilation_y - top, x + j * dilation_x - left)
//
// where what lies beside the picture is left out, not multiplied. The gradient of x is the same sum
// over the output's gradient with the kernel turned round.
//
// Sums are float for 16-bit numbers and rounded once. A result's go from the bias and the first tap
// to the last; those of a weight go over pieces of the picture that depend on its shape alone. So
// results have the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "atrous_conv/tap_segments.h"
#include "common/cpu_isa.h"
#include "common/float_type.h"
#include "common/parallel.h"

namespace pydense {

struct DepthwiseShape {
  int64_t batches;
  int64_t channels;
  int64_t height;  // of x
  int64_t width;
  int64_t out_height;
  int64_t out_width;
  int64_t kernel_height;
  int64_t kernel_width;
  int64_t dilation_y;
  int64_t dilation_x;
  int64_t top;  // padding, of any sign
  int64_t left;
  bool channels_last;  // of everything but the weight
};

// Columns of a row are contiguous, all channels of a pixel for channels_last. Strides are in
// elements, of any sign.
struct DepthwiseSource {
  const void* data;
  int64_t batch;
  int64_t channel;
  int64_t row;
};

// S, the type in memory, is float, double, BFloat16 or Half.
struct DepthwiseArgs {
  DepthwiseShape shape;
  DepthwiseSource x;
  const void* weight;  // S [channels, kernel_height, kernel_width]
  const void* bias;    // S [channels], or null
  void* out;           // S, dense
  bool flipped;        // the kernel is turned round
  bool relu;           // of the result; a NaN stays one
};

struct DepthwiseGradientArgs {
  DepthwiseShape shape;
  DepthwiseSource grad;  // of the output
  DepthwiseSource x;
  void* weight;  // S [channels, kernel_height, kernel_width]
};

void depthwise(const char* op, FloatType dtype, const DepthwiseArgs& args,
               ParallelFor parallel_for);
void depthwise_weight_gradient(const char* op, FloatType dtype, const DepthwiseGradientArgs& args,
                               ParallelFor parallel_for);

void check_depthwise_shape(const char* op, const DepthwiseShape& shape);

// The same on a GPU. Bitwise the same from run to run; forward as on a CPU with fused multiply-add.
void depthwise_cuda(const char* op, FloatType dtype, const DepthwiseArgs& args, int device,
                    void* stream);
// `workspace` holds that many sums: double for double, else float.
int64_t depthwise_gradient_sums(const char* op, const DepthwiseShape& shape);
void depthwise_gradient_cuda(const char* op, FloatType dtype, const DepthwiseGradientArgs& args,
                             void* workspace, int device, void* stream);

// What the kernels of the CPU need besides: the segments of a row, and an order of the output's
// rows in which neighbours read the same rows of x.
struct DepthwisePlan {
  const TapSegment* segments;
  int64_t num_segments;
  const int64_t* rows;  // [out_height]
};

// By FloatType.
struct DepthwiseTable {
  void (*forward[4])(const DepthwiseArgs&, const DepthwisePlan&, ParallelFor);
};
struct DepthwiseGradientTable {
  void (*run[4])(const DepthwiseGradientArgs&, const DepthwisePlan&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(DepthwiseTable, kDepthwiseTable)
PYDENSE_DECLARE_CPU_TABLES(DepthwiseGradientTable, kDepthwiseGradientTable)

}  // namespace pydense
