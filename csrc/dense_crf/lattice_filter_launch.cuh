// SPDX-License-Identifier: Apache-2.0
// Splat and blur as launches, for all that filters with a lattice.
#pragma once

#include <algorithm>
#include <utility>

#include "common/launch.cuh"
#include "common/parallel.h"
#include "dense_crf/device_lattice.h"
#include "dense_crf/lattice_filter_kernels.cuh"

namespace pydense {

// Rows of the vertices, from splat to slice.
template <class T>
struct FilterSpace {
  T* rows;   // [copies, capacity, width] the result
  T* other;  // as many
  T* parts;  // [copies, chunk capacity, width]
};

template <class T>
struct FilterPass {
  const DeviceLattice<T>& lattice;
  const T* values;  // [copies, all points, width], or null for 1
  const T* norm;    // [all points], or null for 1
  int64_t copies;
  int64_t width;
  bool reverse;
};

// Threads along a row, and rows of a block.
inline LaunchConfig rows_config(int64_t rows, int64_t copies, int vectors, int device,
                                void* stream) {
  const int x = std::min(vectors, kRowThreads);
  const int y = std::min(kRowThreads / x, 64);
  return {dim3(static_cast<unsigned>(ceil_div(rows, y)),
               static_cast<unsigned>(std::min<int64_t>(copies, 65535))),
          dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)), 0, device, stream};
}

// space.rows = blur(splat(values * norm)).
template <class T>
void splat_and_blur(const FilterPass<T>& pass, const FilterSpace<T>& space, int device,
                    void* stream) {
  const DeviceLattice<T>& lattice = pass.lattice;
  const auto vectors = static_cast<int>(pass.width / kRowVector<T>);
  const int axes = lattice.shape.dims + 1;
  T* from = axes % 2 == 0 ? space.rows : space.other;  // so that the last blur writes rows
  T* to = axes % 2 == 0 ? space.other : space.rows;
  const SplatParams<T> splat = {lattice.counts,
                                lattice.chunks,
                                lattice.chunk_starts,
                                lattice.entry_points,
                                lattice.entry_weights,
                                pass.norm,
                                pass.values,
                                lattice.shape.all_points(),
                                lattice.capacity,
                                lattice.chunk_capacity,
                                static_cast<int>(pass.copies),
                                vectors,
                                from,
                                space.parts};
  const LaunchConfig chunks =
      rows_config(lattice.chunk_capacity, pass.copies, vectors, device, stream);
  if (pass.values != nullptr) {
    PYDENSE_LAUNCH((lattice_splat_kernel<T, true>), chunks, splat);
  } else {
    PYDENSE_LAUNCH((lattice_splat_kernel<T, false>), chunks, splat);
  }
  LaunchConfig several = {dim3(static_cast<unsigned>(lattice.capacity / kLongThreads)),
                          dim3(kLongThreads), 0, device, stream};
  several.grid.y = static_cast<unsigned>(std::min<int64_t>(pass.copies, 65535));
  PYDENSE_LAUNCH(lattice_splat_long_kernel<T>, several, splat);
  for (int i = 0; i < axes; ++i) {
    const int64_t axis = pass.reverse ? axes - 1 - i : i;
    const BlurParams<T> blur = {lattice.counts,
                                lattice.neighbours + 2 * axis * lattice.capacity,
                                lattice.capacity,
                                static_cast<int>(pass.copies),
                                vectors,
                                from,
                                to};
    PYDENSE_LAUNCH(lattice_blur_kernel<T>,
                   rows_config(lattice.capacity, pass.copies, vectors, device, stream), blur);
    std::swap(from, to);
  }
}

}  // namespace pydense
