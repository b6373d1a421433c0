// SPDX-License-Identifier: Apache-2.0
// The gradient of a dense atrous convolution's weight:
//
//   weight(o, c, i, j) = sum over (n, y, x) of
//       grad(n, o, y, x) x(n, c, y + i * dilation_y - top, x + j * dilation_x - left)
//
// over the outputs whose tap meets the picture. Sums are float for 16-bit numbers, go over parts of
// the pixels in order (common/gemm/gemm_parts.h) and are rounded once: the same bits for any number
// of threads.
#pragma once

#include "atrous_conv/dense.h"

namespace pydense {

// S, the type in memory, is float, double, BFloat16 or Half.
struct DenseConvGradientArgs {
  DenseConvShape shape;
  DenseConvPicture grad;  // S, of the output
  DenseConvPicture x;     // S
  void* weight;           // S [outputs, channels, kernel_height, kernel_width]
};

void dense_conv_weight_gradient(const char* op, FloatType dtype, const DenseConvGradientArgs& args,
                                ParallelFor parallel_for);

// By FloatType.
struct DenseConvGradientTable {
  void (*run[4])(const DenseConvGradientArgs&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(DenseConvGradientTable, kDenseConvGradientTable)
#if defined(PYDENSE_X86_KERNELS)
namespace avx512_bf16 {
void dense_conv_weight_gradient_bf16(const DenseConvGradientArgs& args, ParallelFor parallel_for);
}
#endif

}  // namespace pydense
