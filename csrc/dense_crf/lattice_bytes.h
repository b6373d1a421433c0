// SPDX-License-Identifier: Apache-2.0
// A lattice as one block of bytes: a header, then its arrays, each aligned to 64 bytes. Several
// lattices of a batch follow each other. The bytes belong to the machine and version that wrote
// them.
#pragma once

#include <cstddef>

#include "dense_crf/permutohedral.h"

namespace pydense {

// Numbers of a lattice that decide where its arrays lie.
struct LatticeCounts {
  PointGrid grid;
  int64_t vertices;
  int64_t rows;
  int64_t bands;
  int64_t shared;
  int64_t shared_rows;
  int64_t chain_starts[kMaxLatticeDims + 2];
  int dims;
  bool splat_norm;
  bool slice_norm;  // kSymmetric has one array for both
  bool self;
};

size_t lattice_bytes(const LatticeCounts& counts, size_t scalar_bytes);

// Writes the header to `bytes` and returns the view of the arrays, which are still to be filled.
template <class T>
LatticeView<T> begin_lattice(const LatticeCounts& counts, T scale, void* bytes);

// How many lattices lie in a block. Throws std::invalid_argument where it holds something else, or
// lattices of another scalar type than T.
template <class T>
int64_t count_lattices(const char* op, const void* bytes, size_t size);

// The lattice at `index` of a block that count_lattices has accepted.
template <class T>
LatticeView<T> lattice_at(const void* bytes, int64_t index);

}  // namespace pydense
