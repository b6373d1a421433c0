// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/permutohedral.h"

#include "common/check.h"

namespace pydense {

int64_t Lattice::bytes() const {
  const Buffer* const parts[] = {&weights,       &point_entries, &entries,
                                 &band_entries,  &band_vertices, &shared_vertices,
                                 &shared_starts, &shared_rows,   &chains};
  size_t sum = 0;
  for (const Buffer* part : parts) {
    sum += part->bytes();
  }
  return static_cast<int64_t>(sum);
}

const PermutohedralTable& permutohedral_table() {
  return select_cpu_table<PermutohedralTable>(PYDENSE_CPU_TABLES(kPermutohedralTable));
}

Lattice build_lattice(const LatticeFeatures& features, ParallelFor parallel_for) {
  PYDENSE_CHECK(features.dims >= 1 && features.dims <= kMaxLatticeDims,
                "permutohedral_lattice: features must have 1 to ", kMaxLatticeDims,
                " dimensions, got ", features.dims);
  PYDENSE_CHECK(features.num_points >= 1,
                "permutohedral_lattice: features must have at least 1 "
                "point, got ",
                features.num_points);
  PYDENSE_CHECK(features.num_points <= INT32_MAX / 2 / (features.dims + 1) * kMaxBands,
                "permutohedral_lattice: features must have fewer points, got ",
                features.num_points);
  return permutohedral_table().build(features, parallel_for);
}

void filter_lattice(const FilterArgs& args, ParallelFor parallel_for) {
  PYDENSE_CHECK(args.channels >= 1 && args.channels <= 1 << 30,
                "permutohedral_filter: values must have 1 to 2^30 channels, "
                "got ",
                args.channels);
  permutohedral_table().filter(args, parallel_for);
}

}  // namespace pydense
