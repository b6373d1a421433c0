// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/permutohedral.h"

#include <type_traits>

#include "common/check.h"

namespace pydense {

template <class T>
const PermutohedralTable<T>& permutohedral_table() {
  if constexpr (std::is_same_v<T, float>) {
    return select_cpu_table<PermutohedralTable<T>>(PYDENSE_CPU_TABLES(kPermutohedralTable));
  } else {
    return select_cpu_table<PermutohedralTable<T>>(PYDENSE_CPU_TABLES(kPermutohedralTable64));
  }
}

template <class T>
void build_lattice(const LatticeFeatures<T>& features, const LatticeOptions& options,
                   const ByteSink& sink, ParallelFor parallel_for) {
  PYDENSE_CHECK(features.dims >= 1 && features.dims <= kMaxLatticeDims,
                "permutohedral_lattice: features must have 1 to ", kMaxLatticeDims,
                " dimensions, got ", features.dims);
  PYDENSE_CHECK(features.grid.points() >= 1,
                "permutohedral_lattice: features must have at least 1 point, got ",
                features.grid.points());
  permutohedral_table<T>().build(features, options, sink, parallel_for);
}

template <class T>
void filter_lattice(const FilterArgs<T>& args, ParallelFor parallel_for) {
  PYDENSE_CHECK(args.channels >= 1 && args.channels <= 1 << 30,
                "permutohedral_filter: values must have 1 to 2^30 channels, got ", args.channels);
  permutohedral_table<T>().filter(args, parallel_for);
}

template const PermutohedralTable<float>& permutohedral_table();
template const PermutohedralTable<double>& permutohedral_table();
template void build_lattice(const LatticeFeatures<float>&, const LatticeOptions&, const ByteSink&,
                            ParallelFor);
template void build_lattice(const LatticeFeatures<double>&, const LatticeOptions&, const ByteSink&,
                            ParallelFor);
template void filter_lattice(const FilterArgs<float>&, ParallelFor);
template void filter_lattice(const FilterArgs<double>&, ParallelFor);

}  // namespace pydense
