// SPDX-License-Identifier: Apache-2.0
// The convolution in bfloat16, for CPUs that multiply pairs of it: nothing else gains from them.
#include "atrous_conv/separable_kernel.h"

namespace pydense::PYDENSE_ISA {

void separable_bf16(const SeparableArgs& args, const DepthwisePlan& plan,
                    ParallelFor parallel_for) {
  Separable<BFloat16>(args, plan).run(parallel_for);
}

}  // namespace pydense::PYDENSE_ISA
