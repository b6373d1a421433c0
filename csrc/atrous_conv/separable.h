// SPDX-License-Identifier: Apache-2.0
// Depthwise-separable atrous convolution with stride 1:
//
//   z(c, y, x)   = f(depthwise convolution of x, with its bias)       (depthwise.h)
//   out(o, y, x) = g(pointwise_bias[o] + sum over c of pointwise_weight[o][c] z(c, y, x))
//
// with f and g nothing or ReLU. z goes from the sums straight into the operand of the matrix
// product and never to memory: it is float for 16-bit numbers, but BFloat16 where pairs of that are
// multiplied (common/gemm/gemm_bf16.h). A result's sums go over parts of c
// (common/gemm/gemm_parts.h), and then comes the bias: results have the same bits for any number of
// threads, in both memory formats and on all instruction sets with fused multiply-add; BFloat16 has
// other bits where pairs of it are multiplied.
#pragma once

#include "atrous_conv/depthwise.h"

namespace pydense {

// S, the type in memory, is float, double, BFloat16 or Half.
struct SeparableArgs {
  DepthwiseShape shape;
  DepthwiseSource x;
  const void* depthwise_weight;  // S [channels, kernel_height, kernel_width]
  const void* depthwise_bias;    // S [channels], or null
  int64_t outputs;
  const void* pointwise_weight;  // S [outputs, channels]
  const void* pointwise_bias;    // S [outputs] (float on a GPU), or null
  void* out;                     // S, dense, [batches, outputs, out_height, out_width]
  bool inner_relu;               // of z; a NaN stays one
  bool relu;
};

// Throws std::invalid_argument for sizes out of range.
void check_separable(const char* op, const SeparableArgs& args);

void separable(const char* op, FloatType dtype, const SeparableArgs& args,
               ParallelFor parallel_for);

// On the tensor cores of a GPU, for depthwise kernels of 3 x 3: z is of the type in memory, and
// float is multiplied as TF32. pointwise_bias is float there. Bitwise the same from run to run.
// Throws std::invalid_argument for double and other kernels.
int64_t separable_cuda_workspace(const char* op, FloatType dtype, const SeparableArgs& args);
void separable_cuda(const char* op, FloatType dtype, const SeparableArgs& args, void* workspace,
                    int device, void* stream);

// By FloatType.
struct SeparableTable {
  void (*run[4])(const SeparableArgs&, const DepthwisePlan&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(SeparableTable, kSeparableTable)
#if defined(PYDENSE_X86_KERNELS)
namespace avx512_bf16 {
void separable_bf16(const SeparableArgs& args, const DepthwisePlan& plan, ParallelFor parallel_for);
}
#endif

}  // namespace pydense
