// SPDX-License-Identifier: Apache-2.0
// Axis maps by definition, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "upsample/axis_table.h"

namespace testing {

using namespace pydense;  // NOLINT(google-build-using-namespace)

// What the source coordinate of an output is, in double and without a table.
inline double source_of(const AxisSpec& axis, int64_t y) {
  const auto at = static_cast<double>(y);
  const auto in_size = static_cast<double>(axis.in_size);
  const auto out_size = static_cast<double>(axis.out_size);
  switch (axis.grid) {
    case AxisGrid::kCrop:
      return (at + axis.offset) / static_cast<double>(axis.stride);
    case AxisGrid::kNearest:
      return std::floor(at * in_size / out_size);
    case AxisGrid::kAlignCorners:
      return axis.out_size > 1 ? at * (in_size - 1) / (out_size - 1) : 0;
    default:
      if (axis.in_size == axis.out_size) {
        return at;
      }
      return (at + 0.5) * (axis.scale_factor > 0 ? 1 / axis.scale_factor : in_size / out_size) -
             0.5;
  }
}

inline double weight_of(const AxisSpec& axis, int64_t y, int64_t i) {
  double source = source_of(axis, y);
  if (axis.grid != AxisGrid::kCrop || axis.border == AxisBorder::kClamp) {
    source = std::min(std::max(source, 0.0), static_cast<double>(axis.in_size - 1));
  }
  return std::max(0.0, 1 - std::fabs(source - static_cast<double>(i)));
}

}  // namespace testing
