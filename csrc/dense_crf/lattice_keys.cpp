// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/lattice_keys.h"

#include <algorithm>

#include "common/check.h"
#include "dense_crf/lattice_keys_math.h"

namespace pydense {

void refuse_coordinate(double coordinate, int dims) {
  throw_invalid_argument("permutohedral_lattice: features must be finite and within about ",
                         static_cast<int>(kMaxLatticeCoordinate) / (dims + 1),
                         " standard deviations of the origin, got a lattice coordinate of ",
                         coordinate);
}

KeyLayout plan_keys(const LatticeBounds* bounds, int64_t bands, int dims) {
  KeyLayout layout{};
  int word = 0;
  int used = 0;
  for (int i = 0; i <= dims; ++i) {
    double low = bounds[0].low[i];
    double high = bounds[0].high[i];
    for (int64_t b = 0; b < bands; ++b) {
      if (!coordinates_fit(bounds[b].low[i], bounds[b].high[i])) {
        refuse_coordinate(
            bounds[b].high[i] <= kMaxLatticeCoordinate ? bounds[b].low[i] : bounds[b].high[i],
            dims);
      }
      low = std::min(low, bounds[b].low[i]);
      high = std::max(high, bounds[b].high[i]);
    }
    if (i == dims) {
      break;  // the last coordinate follows from the others
    }
    const CoordinateRange range = coordinate_range(low, high, dims);
    layout.minimum[i] = range.minimum;
    if (used + range.bits > 64) {
      ++word;
      used = 0;
    }
    layout.word[i] = word;
    layout.shift[i] = used;
    used += range.bits;
  }
  layout.words = word + 1;
  return layout;
}

void check_row_count(int64_t rows) {
  PYDENSE_CHECK(rows < INT32_MAX,
                "permutohedral_lattice: features must touch fewer than 2^31 vertices, got ", rows);
}

}  // namespace pydense
