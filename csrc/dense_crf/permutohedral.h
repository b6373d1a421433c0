// SPDX-License-Identifier: Apache-2.0
// The permutohedral lattice of N points: built once per image, then used by every filter pass.
#pragma once

#include <cstdint>

#include "common/buffer.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace pydense {

constexpr int kMaxLatticeDims = 32;

// Points are cut into bands whose size depends on N alone, so bands run in parallel and sums over
// them have a fixed order. A band numbers the vertices it touches itself: its entries. The band
// that touches a vertex first splats into the vertex's own row, every later band into an extra row,
// and merging adds the extra rows in band order. Rows 0..M-1 belong to the vertices, in order of
// first touch, rows M..M+X-1 are the extra ones, both grouped by band.
struct LatticeEntry {
  int32_t row;     // where the band splats to
  int32_t vertex;  // where its points slice from
};

// All arrays are read-only.
struct LatticeView {
  int64_t num_points;    // N
  int64_t num_vertices;  // M
  int64_t num_entries;   // E
  int64_t num_bands;     // B
  int64_t num_shared;    // S vertices have extra rows
  int dims;              // d
  float alpha;
  const float* weights;            // [N, d + 1] barycentric, by remainder
  const int32_t* point_entries;    // [N, d + 1] entry within the band
  const LatticeEntry* entries;     // [E]
  const int64_t* band_entries;     // [B + 1] first entry of each band
  const int64_t* band_vertices;    // [B + 1] first vertex that each band touches first
  const int32_t* shared_vertices;  // [S]
  const int64_t* shared_starts;    // [S + 1] first position in shared_rows
  const int32_t* shared_rows;      // [X] extra rows by vertex, bands in order
  // The vertices that have neighbours along an axis, neighbours next to each other; the last of
  // every chain of neighbours is stored as ~v. Axis j is at [chain_starts[j], chain_starts[j + 1]).
  const int32_t* chains;
  int64_t chain_starts[kMaxLatticeDims + 2];

  int64_t num_rows() const { return num_entries; }  // M + X: every entry has a row
  int64_t band_extra_row(int64_t band) const {
    return num_vertices + band_entries[band] - band_vertices[band];
  }
};

struct Lattice {
  LatticeView view{};
  Buffer weights;
  Buffer point_entries;
  Buffer entries;
  Buffer band_entries;
  Buffer band_vertices;
  Buffer shared_vertices;
  Buffer shared_starts;
  Buffer shared_rows;
  Buffer chains;

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
constexpr int64_t kBandPoints = 16384;
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

// Rows of one lattice from splat to slice.
struct LatticeRows {
  LatticeView lattice;
  int width;
  float* rows;  // [num_rows, width]
};

struct PermutohedralTable {
  Lattice (*build)(const LatticeFeatures&, ParallelFor);
  void (*filter)(const FilterArgs&, ParallelFor);
  // Adds up the bands' rows and blurs in place, all lattices at once.
  void (*merge_and_blur)(const LatticeRows* rows, int count, bool reverse, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(PermutohedralTable, kPermutohedralTable)
const PermutohedralTable& permutohedral_table();

}  // namespace pydense
