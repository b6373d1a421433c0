// SPDX-License-Identifier: Apache-2.0
// The gradients in bfloat16, for CPUs that multiply pairs of it: nothing else gains from them.
#include "chained_residual_pool/weight_gradient_kernel.h"

namespace pydense::PYDENSE_ISA {

void weight_gradient_bf16(const WeightGradientArgs& args, ParallelFor parallel_for) {
  WeightGradient<BFloat16>(args).run(parallel_for);
}

}  // namespace pydense::PYDENSE_ISA
