// SPDX-License-Identifier: Apache-2.0
// The Gaussian filter by brute force:
//   out[b, c, i] = sum_j exp(-|f_i - f_j|^2 / 2) values[b, c, j]
// over all points j, or all but i. Tiles of kernel values are made and used up in the cache; memory
// is linear in the points. This is the oracle of the lattice: distances are sums of squared
// differences (|a|^2 + |b|^2 - 2ab would cancel), and sums go by levels: 16 points, 128 points, and
// over those in double.
//
// Any number of threads gives the same bits, and so do all instruction sets with fused
// multiply-add; baseline x86, which rounds products, differs in the last bits.
//
// 0 * inf is NaN here as anywhere: a NaN or infinity in the values reaches all points of its
// channel, a NaN in a feature reaches all of its image, an infinite feature takes its point out of
// all others' sums and makes its own NaN (with its own term, inf - inf).
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace pydense {

// T is float or double. Strides are in elements, any sign, also 0.
template <class T>
struct ExactFilterArgs {
  const T* features;  // [feature_batches, dims, points]
  const T* values;    // [batches, channels, points]
  T* out;             // [batches, channels, points], contiguous
  int64_t batches;
  int64_t feature_batches;  // batches, or 1: then kernel values are made once for all of them
  int64_t channels;
  int64_t points;
  int64_t dims;
  int64_t feature_strides[3];
  int64_t value_strides[3];
  bool self_term;
};

template <class T>
void check_exact_filter(const ExactFilterArgs<T>& args);  // throws
template <class T>
void exact_filter(const ExactFilterArgs<T>& args, ParallelFor parallel_for);

// The same by CUDA kernels, of checked arguments with nothing empty. Where a GPU rounds otherwise
// than the CPU, results differ in the last bits.
template <class T>
size_t exact_filter_workspace(const ExactFilterArgs<T>& args);
template <class T>
void exact_filter_cuda(const ExactFilterArgs<T>& args, void* workspace, int device, void* stream);

// The work of one task. Rows are the channels, or batches times channels where those share their
// features.
struct ExactFilterTile {
  int64_t image;
  int64_t first_row;
  int64_t rows;
  int64_t first_query;
  int64_t queries;
};
constexpr int64_t kMaxExactDims = 4096;
constexpr int64_t kExactQueries = 128;  // of a tile
constexpr int64_t kExactRows = 256;     // of a tile, at most

struct ExactFilterTable {
  void (*tile_f32)(const ExactFilterArgs<float>&, const ExactFilterTile&);
  void (*tile_f64)(const ExactFilterArgs<double>&, const ExactFilterTile&);
};
PYDENSE_DECLARE_CPU_TABLES(ExactFilterTable, kExactFilterTable)

}  // namespace pydense
