// SPDX-License-Identifier: Apache-2.0
// Dense atrous convolutions on the tensor cores of a GPU: bfloat16 and float16, and float32 as
// TF32.
//
// The same sums as dense.h, in another order: a tile of outputs that all read the same taps goes
// over those taps, and over all channels of each; where tiles do not fill the card, it is cut into
// parts, which are added in order. Which parts there are depends on shapes alone: the same bits
// from run to run, on every card, in both memory formats.
#pragma once

#include "atrous_conv/dense.h"
#include "atrous_conv/dense_gradient.h"

namespace pydense {

constexpr int kMaxDenseConvolutions = 8;  // of a call

// Several convolutions of one picture x, in one launch where they fit. Throws std::invalid_argument
// for float64.
struct DenseConvCudaArgs {
  const DenseConvArgs* convolutions;
  int count;
};
int64_t dense_conv_cuda_workspace(const char* op, FloatType dtype, const DenseConvCudaArgs& args);
void dense_conv_cuda(const char* op, FloatType dtype, const DenseConvCudaArgs& args,
                     void* workspace, int device, void* stream);

// A weight in the order in which tensor cores read it: [taps, outputs, channels], with as many
// channels as fill vectors of 16 bytes, the last ones 0; at a multiple of 16 bytes.
int64_t dense_conv_cuda_packed_bytes(const char* op, FloatType dtype, const DenseConvShape& shape);
void dense_conv_cuda_pack(const char* op, FloatType dtype, const DenseConvShape& shape,
                          const DenseConvWeight& weight, void* packed, int device, void* stream);

// The weight's gradient: per tap, over the outputs whose tap meets the picture, in parts that are
// added in order where tiles do not fill the card.
int64_t dense_conv_weight_gradient_cuda_workspace(const char* op, FloatType dtype,
                                                  const DenseConvGradientArgs& args);
void dense_conv_weight_gradient_cuda(const char* op, FloatType dtype,
                                     const DenseConvGradientArgs& args, void* workspace, int device,
                                     void* stream);

}  // namespace pydense
