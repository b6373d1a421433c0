// SPDX-License-Identifier: Apache-2.0
#include "chained_residual_pool/weight_gradient.h"

namespace pydense {
namespace {

auto function_of(FloatType dtype) {
  const auto& table =
      select_cpu_table<WeightGradientTable>(PYDENSE_CPU_TABLES(kWeightGradientTable));
  return PYDENSE_OF_PAIRS(dtype, weight_gradient_bf16, table.run[static_cast<int>(dtype)]);
}

}  // namespace

void weight_gradient(FloatType dtype, const WeightGradientArgs& args, ParallelFor parallel_for) {
  if (args.shape.channels > 0 && (args.weight != nullptr || args.bias != nullptr)) {
    function_of(dtype)(args, parallel_for);
  }
}

}  // namespace pydense
