// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/separable.h"

#include "atrous_conv/depthwise_plan.h"
#include "common/check.h"

namespace pydense {
namespace {

using Run = void (*)(const SeparableArgs&, const DepthwisePlan&, ParallelFor);

Run run_of(FloatType dtype) {
#if defined(__x86_64__)
  if (dtype == FloatType::kBFloat16 && current_cpu_isa() >= CpuIsa::kAvx512Bf16) {
    return avx512_bf16::separable_bf16;
  }
#endif
  return select_cpu_table<SeparableTable>(PYDENSE_CPU_TABLES(kSeparableTable))
      .run[static_cast<int>(dtype)];
}

}  // namespace

void separable(const char* op, FloatType dtype, const SeparableArgs& args,
               ParallelFor parallel_for) {
  const DepthwisePlanMemory memory(op, args.shape);
  PYDENSE_CHECK(args.shape.channels >= 1 && args.outputs >= 1, op,
                ": channels must be at least 1, got ", args.shape.channels, " to ", args.outputs);
  if (args.shape.batches > 0) {
    run_of(dtype)(args, memory.plan(), parallel_for);
  }
}

}  // namespace pydense
