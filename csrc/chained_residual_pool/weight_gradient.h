// SPDX-License-Identifier: Apache-2.0
// Gradients of a 1x1 convolution's parameters:
//
//   weight[o][i] = sum over pixels of grad(o, pixel) input(i, pixel)
//   bias[o]      = sum over pixels of grad(o, pixel)
//
// Pixels are cut into slabs whose size depends on the shape alone, and the sums of slabs are added
// in their order: results have the same bits for any number of threads.
#pragma once

#include "chained_residual_pool/max_pool.h"

namespace pydense {

// S, the type in memory, is float, double, BFloat16 or Half. shape.size is not used.
struct WeightGradientArgs {
  PoolShape shape;
  PoolSource grad;
  PoolSource input;  // its data may be null where weight is
  void* weight;      // S [C, C], output by input; or null
  void* bias;        // S [C]; or null
};

void weight_gradient(FloatType dtype, const WeightGradientArgs& args, ParallelFor parallel_for);

// By FloatType.
struct WeightGradientTable {
  void (*run[4])(const WeightGradientArgs&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(WeightGradientTable, kWeightGradientTable)
#if defined(PYDENSE_X86_KERNELS)
namespace avx512_bf16 {
void weight_gradient_bf16(const WeightGradientArgs& args, ParallelFor parallel_for);
}
#endif

}  // namespace pydense
