// SPDX-License-Identifier: Apache-2.0
#include "chained_residual_pool/weight_gradient.h"

namespace pydense {
namespace {

using Function = void (*)(const WeightGradientArgs&, ParallelFor);

Function function_of(FloatType dtype) {
#if defined(__x86_64__)
  if (dtype == FloatType::kBFloat16 && current_cpu_isa() >= CpuIsa::kAvx512Bf16) {
    return avx512_bf16::weight_gradient_bf16;
  }
#endif
  return select_cpu_table<WeightGradientTable>(PYDENSE_CPU_TABLES(kWeightGradientTable))
      .run[static_cast<int>(dtype)];
}

}  // namespace

void weight_gradient(FloatType dtype, const WeightGradientArgs& args, ParallelFor parallel_for) {
  if (args.shape.channels > 0 && (args.weight != nullptr || args.bias != nullptr)) {
    function_of(dtype)(args, parallel_for);
  }
}

}  // namespace pydense
