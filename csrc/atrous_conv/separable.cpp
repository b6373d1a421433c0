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

void check_separable(const char* op, const SeparableArgs& args) {
  check_depthwise_shape(op, args.shape);
  PYDENSE_CHECK(args.shape.channels >= 1 && args.outputs >= 1, op,
                ": channels must be at least 1, got ", args.shape.channels, " to ", args.outputs);
}

void separable(const char* op, FloatType dtype, const SeparableArgs& args,
               ParallelFor parallel_for) {
  check_separable(op, args);
  const DepthwisePlanMemory memory(op, args.shape);
  if (args.shape.batches > 0) {
    run_of(dtype)(args, memory.plan(), parallel_for);
  }
}

}  // namespace pydense
