// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/lattice_keys.h"

#include <algorithm>

#include "common/check.h"

namespace pydense {
namespace {

// Beyond this, float32 coordinates are too coarse to weigh the vertices of a simplex.
constexpr double kMaxCoordinate = 1048576.0;

}  // namespace

KeyLayout plan_keys(const LatticeBounds* bounds, int64_t bands, int dims) {
  KeyLayout layout{};
  int word = 0;
  int used = 0;
  for (int i = 0; i <= dims; ++i) {
    double low = bounds[0].low[i];
    double high = bounds[0].high[i];
    for (int64_t b = 0; b < bands; ++b) {
      // Written so that NaN fails.
      PYDENSE_CHECK(bounds[b].low[i] >= -kMaxCoordinate && bounds[b].high[i] <= kMaxCoordinate,
                    "permutohedral_lattice: features must be finite and within about ",
                    static_cast<int>(kMaxCoordinate) / (dims + 1),
                    " standard deviations of the origin, got a lattice coordinate of ",
                    bounds[b].high[i] <= kMaxCoordinate ? bounds[b].low[i] : bounds[b].high[i]);
      low = std::min(low, bounds[b].low[i]);
      high = std::max(high, bounds[b].high[i]);
    }
    if (i == dims) {
      break;  // the last coordinate follows from the others
    }
    // A vertex of the simplex lies within 2 (d + 1) of the point, its neighbours within d more.
    const int32_t margin = 3 * (dims + 1) + 1;
    layout.minimum[i] = static_cast<int32_t>(low) - margin;
    const auto range =
        static_cast<uint32_t>(static_cast<int32_t>(high) + margin - layout.minimum[i]);
    const int bits = 32 - __builtin_clz(range);
    if (used + bits > 64) {
      ++word;
      used = 0;
    }
    layout.word[i] = word;
    layout.shift[i] = used;
    used += bits;
  }
  layout.words = word + 1;
  return layout;
}

void check_row_count(int64_t rows) {
  PYDENSE_CHECK(rows < INT32_MAX,
                "permutohedral_lattice: features must touch fewer than 2^31 vertices, got ", rows);
}

}  // namespace pydense
