// SPDX-License-Identifier: Apache-2.0
// Lattices for the tests of the dense CRF.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "dense_crf/lattice_bytes.h"
#include "dense_crf/permutohedral.h"
#include "testing.h"

namespace testing {

using namespace pydense;  // NOLINT(google-build-using-namespace)

inline std::vector<float> random_floats(size_t n, float scale, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-scale, scale);
  std::vector<float> values(n);
  for (float& value : values) {
    value = uniform(generator);
  }
  return values;
}

struct Lattice {
  Buffer bytes;
  LatticeView<float> view{};
};

// width: of a picture, or 0 for points without an order.
inline Lattice build(const std::vector<float>& features, int dims,
                     ParallelFor parallel_for = thread_for,
                     LatticeOptions options = {Normalization::kNone, true}, int64_t width = 0) {
  const auto n = static_cast<int64_t>(features.size()) / std::max(dims, 1);
  Lattice lattice;
  const ByteSink sink = {&lattice.bytes, [](void* bytes, size_t size) {
                           *static_cast<Buffer*>(bytes) = Buffer(size);
                           return static_cast<Buffer*>(bytes)->data();
                         }};
  const PointGrid grid = width == 0 ? PointGrid{1, n} : PointGrid{n / width, width};
  build_lattice<float>({features.data(), grid, dims, n, 1}, options, sink, parallel_for);
  lattice.view = lattice_at<float>(lattice.bytes.data(), 0);
  return lattice;
}

inline std::vector<float> filter(const Lattice& lattice, const std::vector<float>& values,
                                 bool reverse, ParallelFor parallel_for = thread_for) {
  const int64_t n = lattice.view.num_points();
  std::vector<float> out(values.size());
  filter_lattice<float>(
      {&lattice.view, values.data(), out.data(),
       static_cast<int>(static_cast<int64_t>(values.size()) / n), n, 1, n, 1, reverse},
      parallel_for);
  return out;
}

}  // namespace testing
