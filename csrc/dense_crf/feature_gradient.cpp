// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/feature_gradient.h"

#include <type_traits>

#include "common/check.h"

namespace pydense {

template <class T>
void feature_gradient(const FeatureGradientArgs<T>& args, ParallelFor parallel_for) {
  PYDENSE_CHECK(
      !args.of_lattice || args.lattice->self == nullptr,
      "dense_crf_feature_gradient: the derivative of the lattice itself must be asked for "
      "with self_term=True");
  if constexpr (std::is_same_v<T, float>) {
    select_cpu_table<FeatureGradientTable<T>>(PYDENSE_CPU_TABLES(kFeatureGradientTable))
        .run(args, parallel_for);
  } else {
    select_cpu_table<FeatureGradientTable<T>>(PYDENSE_CPU_TABLES(kFeatureGradientTable64))
        .run(args, parallel_for);
  }
}

template void feature_gradient(const FeatureGradientArgs<float>&, ParallelFor);
template void feature_gradient(const FeatureGradientArgs<double>&, ParallelFor);

}  // namespace pydense
