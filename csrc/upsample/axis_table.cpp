// SPDX-License-Identifier: Apache-2.0
#include "upsample/axis_table.h"

#include <algorithm>

#include "common/check.h"

namespace pydense {

template <class T>
AxisMap<T> axis_map(const AxisSpec& spec) {
  switch (spec.grid) {
    case AxisGrid::kNearest:
      return portable::nearest_axis<T>(spec.in_size, spec.out_size);
    case AxisGrid::kCrop:
      return portable::crop_axis<T>(spec.in_size, spec.out_size, spec.stride, spec.offset,
                                    spec.border);
    default:
      return portable::interpolate_axis<T>(spec.in_size, spec.out_size,
                                           spec.grid == AxisGrid::kAlignCorners, spec.scale_factor);
  }
}
template AxisMap<float> axis_map<float>(const AxisSpec&);
template AxisMap<double> axis_map<double>(const AxisSpec&);

AxisSpec interpolation_axis(int64_t in_size, int64_t out_size, bool align_corners) {
  const AxisGrid grid = align_corners ? AxisGrid::kAlignCorners : AxisGrid::kHalfPixel;
  return {grid, AxisBorder::kClamp, in_size, out_size, 0, 1, 0};
}

template <class T>
AxisTable<T>::AxisTable() = default;
template <class T>
AxisTable<T>::AxisTable(AxisTable&&) noexcept = default;
template <class T>
AxisTable<T>& AxisTable<T>::operator=(AxisTable&&) noexcept = default;
template <class T>
AxisTable<T>::~AxisTable() = default;

template <class T>
AxisTable<T>::AxisTable(const AxisSpec& spec) : in_size(spec.in_size), size(spec.out_size) {
  PYDENSE_CHECK(in_size >= 1 && size >= 1 && in_size <= kMaxSize && size <= kMaxSize,
                "upsampling: sizes must be in [1, ", kMaxSize, "], got ", in_size, " to ", size);
  const int64_t padded = size + kPadding;
  weights = buffer_of<T>(static_cast<size_t>(2 * padded));
  indices = buffer_of<int32_t>(static_cast<size_t>(2 * padded));
  w0 = weights.template as<T>();
  w1 = w0 + padded;
  i0 = indices.template as<int32_t>();
  i1 = i0 + padded;
  const AxisMap<T> map = axis_map<T>(spec);
  for (int64_t y = 0; y < padded; ++y) {
    const AxisTaps<T> taps = portable::axis_taps(map, std::min(y, size - 1));
    i0[y] = static_cast<int32_t>(taps.i0);
    i1[y] = static_cast<int32_t>(taps.i1);
    w0[y] = taps.w0;
    w1[y] = taps.w1;
    if (y < size) {
      begin += taps.i0 < 0 ? 1 : 0;
      end += taps.i0 < in_size ? 1 : 0;
    }
  }
}

template struct AxisTable<float>;
template struct AxisTable<double>;

}  // namespace pydense
