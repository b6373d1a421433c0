// SPDX-License-Identifier: Apache-2.0
// The permutohedral lattice of N points: built once per image, then used by every filter pass.
#pragma once

#include <cstdint>

#include "common/buffer.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace pydense {

constexpr int kMaxLatticeDims = 32;

// Points are cut into bands whose size depends on N alone. A band numbers the vertices it touches
// itself ("entries") and splats into rows of its own, so bands run in parallel and the sums over
// them have a fixed order. All arrays are read-only; p = [num_points], E = entries of all bands.
struct LatticeView {
  int64_t num_points;
  int64_t num_vertices;  // M
  int64_t num_entries;   // E
  int64_t num_bands;     // B
  int dims;              // d
  float alpha;
  const float* weights;           // [num_points, d + 1] barycentric, by remainder
  const int32_t* entries;         // [num_points, d + 1] entry within the band
  const int64_t* band_entries;    // [B + 1] first entry of each band
  const int32_t* entry_vertex;    // [E] vertex of an entry
  const int64_t* vertex_entries;  // [M + 1] first position in `merge` of each vertex
  const int32_t* merge;           // [E] entries by vertex, bands in order
  const int32_t* neighbours;      // [d + 1, M, 2] the two neighbours along an axis, M where missing
};

struct Lattice {
  LatticeView view{};
  Buffer weights;
  Buffer entries;
  Buffer band_entries;
  Buffer entry_vertex;
  Buffer vertex_entries;
  Buffer merge;
  Buffer neighbours;

  int64_t bytes() const;
};

// features[i * dim_stride + p * point_stride]: float, already divided by the standard deviations.
struct LatticeFeatures {
  const float* data;
  int64_t num_points;
  int dims;
  int64_t dim_stride;
  int64_t point_stride;
};

// First point of a band, and the number of bands, as functions of N.
constexpr int64_t kBandPoints = 8192;
constexpr int64_t kMaxBands = 128;
constexpr int64_t lattice_bands(int64_t num_points) {
  const int64_t bands = ceil_div(num_points, kBandPoints);
  return bands < 1 ? 1 : (bands > kMaxBands ? kMaxBands : bands);
}
constexpr int64_t band_begin(int64_t num_points, int64_t bands, int64_t band) {
  return num_points / bands * band + (num_points % bands) * band / bands;
}

// Throws std::invalid_argument for non-finite features or coordinates that do not fit.
Lattice build_lattice(const LatticeFeatures& features, ParallelFor parallel_for);

// out = slice(blur(splat(values))) for `channels` channels; reverse blurs the axes in reversed
// order, which is the transposed filter.
struct FilterArgs {
  const LatticeView* lattice;
  const float* values;  // [channels, num_points] by strides
  float* out;           // [channels, num_points] by strides
  int channels;
  int64_t value_channel_stride;
  int64_t value_point_stride;
  int64_t out_channel_stride;
  int64_t out_point_stride;
  bool reverse;
};
void filter_lattice(const FilterArgs& args, ParallelFor parallel_for);

// Floats in a row of `channels`: 1, 2, 4, 8, 16, 24, 32, then multiples of 16.
constexpr int row_width(int channels) {
  if (channels <= 2) {
    return channels;
  }
  if (channels <= 4) {
    return 4;
  }
  return channels <= 32 ? (channels + 7) / 8 * 8 : (channels + 15) / 16 * 16;
}

// Rows of one lattice during splat and blur. The row after the last vertex stays zero and stands
// for missing neighbours.
struct LatticeRows {
  LatticeView lattice;
  int width;
  float* entry_rows;   // [E, width]
  float* vertex_rows;  // [2, M + 1, width]: blur goes back and forth between the two
};

struct PermutohedralTable {
  Lattice (*build)(const LatticeFeatures&, ParallelFor);
  void (*filter)(const FilterArgs&, ParallelFor);
  // Sums the bands' rows and blurs, all lattices at once; the result is in
  // vertex_rows + blurred_rows_offset(lattice, width).
  void (*merge_and_blur)(const LatticeRows* rows, int count, bool reverse, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(PermutohedralTable, kPermutohedralTable)
const PermutohedralTable& permutohedral_table();

constexpr int64_t blurred_rows_offset(const LatticeView& lattice, int width) {
  return (lattice.dims + 1) % 2 == 0 ? 0 : (lattice.num_vertices + 1) * width;
}

}  // namespace pydense
