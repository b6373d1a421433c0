// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/separable.h"

#include "atrous_conv/depthwise_plan.h"
#include "common/check.h"

namespace pydense {
namespace {

auto run_of(FloatType dtype) {
  const auto& table = select_cpu_table<SeparableTable>(PYDENSE_CPU_TABLES(kSeparableTable));
  return PYDENSE_OF_PAIRS(dtype, separable_bf16, table.run[static_cast<int>(dtype)]);
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
