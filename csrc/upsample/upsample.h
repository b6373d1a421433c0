// SPDX-License-Identifier: Apache-2.0
// Separable two-tap upsampling of pictures: out = act(sum_k U_k x_k) with U_k given by an axis map
// per axis (upsample_math.h), and its adjoint. One input is F.interpolate or Caffe's Deconvolution
// + Crop, several are the sums of multi-resolution networks.
//
// Results have the same bits for any number of threads and on all instruction sets with fused
// multiply-add; baseline x86, which rounds products, differs in the last bits.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/float_type.h"
#include "common/parallel.h"
#include "upsample/axis_table.h"

namespace pydense {

constexpr int kMaxUpsampleInputs = 16;

// A picture in memory: rows of one channel (channels_last false), or of all channels, pixel by
// pixel, are contiguous. Other strides are in elements, any sign.
struct PictureStrides {
  int64_t batch;
  int64_t channel;  // 1 for channels_last
  int64_t row;
};

// One of the inputs, or the gradient of one.
struct UpsampleInput {
  void* data;  // not written in the forward pass
  PictureStrides strides;
  AxisSpec y;
  AxisSpec x;
  bool same_size;  // added as it is: y and x are not used
};

struct UpsampleShape {
  int64_t batches;
  int64_t channels;
  int64_t height;  // of the output
  int64_t width;
  bool channels_last;  // of everything
};

// S, the type in memory, is float, double, BFloat16 or Half.
struct UpsampleArgs {
  UpsampleShape shape;
  const UpsampleInput* inputs;
  int num_inputs;
  void* out;  // dense
  bool relu;
};

struct UpsampleBackwardArgs {
  UpsampleShape shape;
  const void* grad;
  PictureStrides grad_strides;
  // For relu: the dense output of the forward pass, else null. Where it is 0, grad does not count.
  const void* out;
  const UpsampleInput* inputs;  // gradients, dense; of those with the size of the output, one
  int num_inputs;
};

// Before an output is allocated.
void check_upsample_size(const char* op, int64_t height, int64_t width);
void check_upsample(const char* op, const UpsampleShape& shape, const UpsampleInput* inputs,
                    int num_inputs);

void upsample_forward(const char* op, FloatType dtype, const UpsampleArgs& args,
                      ParallelFor parallel_for);
void upsample_backward(const char* op, FloatType dtype, const UpsampleBackwardArgs& args,
                       ParallelFor parallel_for);

// The same on a GPU, in order on a stream; nothing is allocated and nobody waits. The forward pass
// has the bits of the CPU kernels with fused multiply-add; the backward pass has those of their
// contiguous form, in both memory formats.
void upsample_forward_cuda(const char* op, FloatType dtype, const UpsampleArgs& args, int device,
                           void* stream);
void upsample_backward_cuda(const char* op, FloatType dtype, const UpsampleBackwardArgs& args,
                            int device, void* stream);

// By FloatType.
struct UpsampleTable {
  void (*forward[4])(const UpsampleArgs&, ParallelFor);
  void (*backward[4])(const UpsampleBackwardArgs&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(UpsampleTable, kUpsampleTable)

}  // namespace pydense
