// SPDX-License-Identifier: Apache-2.0
// What a DepthwisePlan points to. Not for units that are compiled once per instruction set.
#pragma once

#include <vector>

#include "atrous_conv/depthwise.h"

namespace pydense {

class DepthwisePlanMemory {
 public:
  // Throws std::invalid_argument for a shape that is none.
  DepthwisePlanMemory(const char* op, const DepthwiseShape& shape);

  DepthwisePlan plan() const {
    return {segments_.data(), static_cast<int64_t>(segments_.size()), rows_.data()};
  }

 private:
  std::vector<TapSegment> segments_;
  std::vector<int64_t> rows_;
};

}  // namespace pydense
