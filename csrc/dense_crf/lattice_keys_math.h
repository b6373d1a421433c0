// SPDX-License-Identifier: Apache-2.0
// How far a lattice's coordinates may reach, for CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace pydense {

// Beyond this, float32 coordinates are too coarse to weigh the vertices of a simplex.
constexpr double kMaxLatticeCoordinate = 1048576.0;

// False for NaN too.
PYDENSE_HD bool coordinates_fit(double low, double high) {
  return low >= -kMaxLatticeCoordinate && high <= kMaxLatticeCoordinate;
}

// What is taken off a coordinate in a key, and the bits that the rest needs.
struct CoordinateRange {
  int32_t minimum;
  int bits;
};

// low, high: of the elevated coordinate of all points, and they fit.
PYDENSE_HD CoordinateRange coordinate_range(double low, double high, int dims) {
  // A vertex of the simplex lies within 2 (d + 1) of the point, its neighbours within d more.
  const int32_t margin = 3 * (dims + 1) + 1;
  const int32_t minimum = static_cast<int32_t>(low) - margin;
  const auto range = static_cast<uint32_t>(static_cast<int32_t>(high) + margin - minimum);
  int bits = 0;
  while ((range >> bits) != 0) {
    ++bits;
  }
  return {minimum, bits};
}

}  // namespace pydense
