// SPDX-License-Identifier: Apache-2.0
// The permutohedral lattice of N points: built once per image, then used by every filter pass.
// T is float or double.
#pragma once

#include <cstdint>

#include "common/buffer.h"
#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "dense_crf/bands.h"

namespace pydense {

constexpr int kMaxLatticeDims = 32;

// The filter is after * K * before with n = K 1; kSymmetric has n^-1/2 on both sides.
enum class Normalization { kNone, kBefore, kAfter, kSymmetric };

// Points are cut into bands that depend on the picture's size alone, so bands run in parallel and
// sums over them have a fixed order. A band has one row of values for each vertex it touches, and
// its rows lie together: points know a vertex by the row's place in the band. The row in the band
// that touches the vertex first is the vertex's own; merging adds those of later bands to it in
// band order, blurring works on own rows, and spreading copies them back to the later bands.

// Rows within a band are numbered in 16 bits for the usual dimensions, position (2-D, 3-D) and
// position with RGB, whose kernels are compiled for them; in 32 bits for others.
constexpr bool has_short_ids(int dims) { return dims == 2 || dims == 3 || dims == 5; }
static_assert(kBandPoints * (5 + 1) <= 65536);

constexpr int kLongChain = 8;
constexpr int64_t kChainPadding = 64;

// All arrays are read-only.
template <class T>
struct LatticeView {
  PointGrid grid;                // N points
  int64_t num_vertices;          // M
  int64_t num_rows;              // R
  int64_t num_shared;            // S vertices have rows in several bands
  int dims;                      // d
  T scale;                       // what is left to multiply the filter with
  const T* weights;              // [N, d + 1] barycentric, by remainder; in the order of bands
  const void* ids;               // [N, d + 1] row within the band, uint16_t or int32_t
  const int64_t* band_rows;      // [B + 1] first row of each band
  const int64_t* shared_starts;  // [S + 1] first position in shared_rows
  const int32_t* shared_rows;    // own row, then those of later bands, for each shared vertex
  const T* splat_norm;           // [N], null for 1
  const T* slice_norm;           // [N], null for 1
  const T* self;                 // [N] the filter's diagonal where it is to be taken out, or null
  // Own rows of the vertices that have neighbours along an axis, neighbours next to each other; the
  // last of every chain of neighbours is stored as ~row. Axis j is at [chain_starts[j],
  // chain_starts[j + 1]), chains of less than kLongChain rows first, in order of their length.
  // Beyond the last axis follow kChainPadding rows that may be prefetched.
  const int32_t* chains;
  int64_t chain_starts[kMaxLatticeDims + 2];

  PYDENSE_HD int64_t num_points() const { return grid.points(); }
};

// features[i * dim_stride + pixel * point_stride], already divided by the standard deviations.
template <class T>
struct LatticeFeatures {
  const T* data;
  PointGrid grid;
  int dims;
  int64_t dim_stride;
  int64_t point_stride;
};

struct LatticeOptions {
  Normalization normalization;
  bool self_term;  // false: K without its diagonal
};

// Where a lattice's bytes go: called once, returns memory aligned to 64 bytes or throws.
struct ByteSink {
  void* context;
  void* (*allocate)(void* context, size_t bytes);
};

// Writes the lattice as one block of bytes. Throws std::invalid_argument for non-finite features or
// coordinates that do not fit.
template <class T>
void build_lattice(const LatticeFeatures<T>& features, const LatticeOptions& options,
                   const ByteSink& sink, ParallelFor parallel_for);

// out = slice(blur(splat(values))) with the lattice's normalisation; reverse is the transposed
// filter, which blurs the axes in reversed order.
template <class T>
struct FilterArgs {
  const LatticeView<T>* lattice;
  const T* values;  // [channels, num_points] by strides
  T* out;           // [channels, num_points] by strides
  int channels;
  int64_t value_channel_stride;
  int64_t value_point_stride;
  int64_t out_channel_stride;
  int64_t out_point_stride;
  bool reverse;
};
template <class T>
void filter_lattice(const FilterArgs<T>& args, ParallelFor parallel_for);

// Values in a row of `channels`: 1, 2, 4, 8, 16, 24, 32, then multiples of 16.
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
template <class T>
struct LatticeRows {
  LatticeView<T> lattice;
  int width;
  T* rows;  // [num_rows, width]
};

template <class T>
struct PermutohedralTable {
  void (*build)(const LatticeFeatures<T>&, const LatticeOptions&, const ByteSink&, ParallelFor);
  void (*filter)(const FilterArgs<T>&, ParallelFor);
  // Adds up the bands' rows, blurs in place and spreads the result.
  void (*merge_and_blur)(const LatticeRows<T>& rows, bool reverse, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(PermutohedralTable<float>, kPermutohedralTable)
PYDENSE_DECLARE_CPU_TABLES(PermutohedralTable<double>, kPermutohedralTable64)
template <class T>
const PermutohedralTable<T>& permutohedral_table();

}  // namespace pydense
