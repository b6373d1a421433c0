// SPDX-License-Identifier: Apache-2.0
// Which taps of a dilated kernel meet the picture, along one axis.
#pragma once

#include <cstdint>
#include <vector>

namespace pydense {

// Outputs [begin, end) all read the taps [first, last) and no others.
struct TapSegment {
  int64_t begin;
  int64_t end;
  int64_t first;
  int64_t last;
};

// All outputs, in order. Output y reads y + i * dilation - padding for tap i.
std::vector<TapSegment> tap_segments(int64_t taps, int64_t dilation, int64_t padding, int64_t size,
                                     int64_t out_size);

}  // namespace pydense
