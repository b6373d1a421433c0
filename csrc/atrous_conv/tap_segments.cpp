// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/tap_segments.h"

#include <algorithm>

namespace pydense {

// Outputs that tap i reads a pixel for are [begin, end), those of the next tap begin and end no
// later: between any two such places, the taps are a range.
std::vector<TapSegment> tap_segments(int64_t taps, int64_t dilation, int64_t padding, int64_t size,
                                     int64_t out_size) {
  std::vector<int64_t> cuts = {0, out_size};
  for (int64_t i = 0; i < taps; ++i) {
    const int64_t begin = padding - i * dilation;
    cuts.push_back(std::clamp<int64_t>(begin, 0, out_size));
    cuts.push_back(std::clamp<int64_t>(begin + size, 0, out_size));
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<TapSegment> segments;
  for (size_t k = 0; k + 1 < cuts.size(); ++k) {
    TapSegment segment = {cuts[k], cuts[k + 1], taps, 0};
    for (int64_t i = 0; i < taps; ++i) {
      const int64_t read = segment.begin + i * dilation - padding;
      if (read >= 0 && read < size) {
        segment.first = std::min(segment.first, i);
        segment.last = i + 1;
      }
    }
    segment.first = std::min(segment.first, segment.last);
    segments.push_back(segment);
  }
  return segments;
}

}  // namespace pydense
