// SPDX-License-Identifier: Apache-2.0
// The taps of all outputs of an axis, worked out once per call.
#pragma once

#include <cstdint>
#include <limits>

#include "common/buffer.h"
#include "upsample/upsample_math.h"

namespace pydense {

// What an axis map is made of; see the functions of the same names in upsample_math.h.
struct AxisSpec {
  AxisGrid grid;
  AxisBorder border;
  int64_t in_size;
  int64_t out_size;
  double scale_factor;  // kHalfPixel, 0: none given
  int64_t stride;       // kCrop
  double offset;        // kCrop
};

// F.interpolate's axis between two sizes.
AxisSpec interpolation_axis(int64_t in_size, int64_t out_size, bool align_corners);

template <class T>
AxisMap<T> axis_map(const AxisSpec& spec);

// Nothing here is inline on purpose: units compiled for different instruction sets share it.
template <class T>
struct AxisTable {
  // Copies of the last output's taps follow it, so that vectors may be read past the end.
  static constexpr int64_t kPadding = 64;
  static constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() - kPadding;

  AxisTable();
  explicit AxisTable(const AxisSpec& spec);
  AxisTable(AxisTable&& other) noexcept;
  AxisTable& operator=(AxisTable&& other) noexcept;
  ~AxisTable();

  Buffer weights;
  Buffer indices;
  T* w0 = nullptr;
  T* w1 = nullptr;
  int32_t* i0 = nullptr;
  int32_t* i1 = nullptr;
  int64_t in_size = 0;
  int64_t size = 0;
  int64_t begin = 0;  // the outputs that inputs reach: [begin, end)
  int64_t end = 0;
};

}  // namespace pydense
