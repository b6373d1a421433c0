// SPDX-License-Identifier: Apache-2.0
#include "chained_residual_pool/residual_stage.h"

#include "common/check.h"

namespace pydense {
namespace {

const ResidualStageTable& table() {
  return select_cpu_table<ResidualStageTable>(PYDENSE_CPU_TABLES(kResidualStageTable));
}

auto stage_of(FloatType dtype) {
  return PYDENSE_OF_PAIRS(dtype, residual_stage_bf16, table().stage[static_cast<int>(dtype)]);
}

}  // namespace

void residual_stage(const char* op, FloatType dtype, const ResidualStageArgs& args,
                    ParallelFor parallel_for) {
  PoolShape shape = args.shape;
  shape.size = shape.size == 1 ? kMinPoolSize : shape.size;
  check_pool_shape(op, shape);
  PYDENSE_CHECK(args.num_addends >= 0 && args.num_addends <= kMaxResidualStages, op,
                ": weights must be at most ", kMaxResidualStages, ", got ", args.num_addends);
  if (!is_empty(args.shape)) {
    stage_of(dtype)(args, parallel_for);
  }
}

void residual_sum(FloatType dtype, const ResidualSumArgs& args, ParallelFor parallel_for) {
  if (!is_empty(args.shape)) {
    table().sum[static_cast<int>(dtype)](args, parallel_for);
  }
}

}  // namespace pydense
