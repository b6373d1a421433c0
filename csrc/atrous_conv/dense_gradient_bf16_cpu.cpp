// SPDX-License-Identifier: Apache-2.0
// The weight's gradient in bfloat16, for CPUs that multiply pairs of it.
#include "atrous_conv/dense_gradient_kernel.h"

namespace pydense::PYDENSE_ISA {

void dense_conv_weight_gradient_bf16(const DenseConvGradientArgs& args, ParallelFor parallel_for) {
  DenseWeightGradient<BFloat16>(args).run(parallel_for);
}

}  // namespace pydense::PYDENSE_ISA
