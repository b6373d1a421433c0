// SPDX-License-Identifier: Apache-2.0
// The range of a lattice's coordinates and how they are packed into keys. Not part of the units
// that are compiled per instruction set: only those may hold their instructions, and a check that
// builds a message is a template the linker would share.
#pragma once

#include <cstdint>

#include "dense_crf/permutohedral.h"

namespace pydense {

// Smallest and largest elevated coordinates of a band's points; NaN in low where one is not finite.
struct LatticeBounds {
  double low[kMaxLatticeDims + 1];
  double high[kMaxLatticeDims + 1];
};

// Where each of the d coordinates lies in a key. Coordinates are stored minus their minimum and
// never straddle words; the ranges leave room for the neighbours, so no two vertices share a key
// and sums of keys never carry from one coordinate into the next.
struct KeyLayout {
  int words;
  int word[kMaxLatticeDims];
  int shift[kMaxLatticeDims];
  int32_t minimum[kMaxLatticeDims];
};

// Throws std::invalid_argument where a coordinate is not finite or does not fit.
KeyLayout plan_keys(const LatticeBounds* bounds, int64_t bands, int dims);

// Throws that error.
[[noreturn]] void refuse_coordinate(double coordinate, int dims);

// Rows are numbered in 32 bits.
void check_row_count(int64_t rows);

}  // namespace pydense
