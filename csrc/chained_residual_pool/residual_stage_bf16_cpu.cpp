// SPDX-License-Identifier: Apache-2.0
// The stage in bfloat16, for CPUs that multiply pairs of it: nothing else gains from them.
#include "chained_residual_pool/residual_stage_kernel.h"

namespace pydense::PYDENSE_ISA {

void residual_stage_bf16(const ResidualStageArgs& args, ParallelFor parallel_for) {
  Stage<BFloat16>(args).run(parallel_for);
}

}  // namespace pydense::PYDENSE_ISA
