// SPDX-License-Identifier: Apache-2.0
#include "chained_residual_pool/weight_gradient.h"

namespace pydense {

void weight_gradient(FloatType dtype, const WeightGradientArgs& args, ParallelFor parallel_for) {
  if (args.shape.channels > 0 && (args.weight != nullptr || args.bias != nullptr)) {
    select_cpu_table<WeightGradientTable>(PYDENSE_CPU_TABLES(kWeightGradientTable))
        .run[static_cast<int>(dtype)](args, parallel_for);
  }
}

}  // namespace pydense
