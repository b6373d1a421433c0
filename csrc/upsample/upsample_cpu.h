// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of both directions share: the taps of an axis as arrays, and small helpers
// over vectors.
#pragma once

#include <cstring>
#include <utility>

#include "common/buffer.h"
#include "common/half.h"
#include "upsample/upsample.h"

namespace pydense::PYDENSE_ISA {

template <class S>
void upsample_forward_cpu(const UpsampleArgs& args, ParallelFor parallel_for);
template <class S>
void upsample_backward_cpu(const UpsampleBackwardArgs& args, ParallelFor parallel_for);

PYDENSE_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYDENSE_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// v[index[l]] in lane l.
template <class V, class I>
PYDENSE_HD V permute(const V& v, const I& index) {
#if defined(__clang__)
  V result;
  for (int l = 0; l < kLanesIn<V>; ++l) {
    result[l] = v[index[l]];
  }
  return result;
#else
  return __builtin_shuffle(v, index);
#endif
}

template <class V, int Distance, int... Lane>
PYDENSE_HD void exchange(V& a, V& b, std::integer_sequence<int, Lane...> /*lanes*/) {
  constexpr int kLanes = sizeof...(Lane);
  const V low =
      __builtin_shufflevector(a, b, ((Lane & Distance) != 0 ? kLanes + Lane - Distance : Lane)...);
  b = __builtin_shufflevector(a, b, ((Lane & Distance) != 0 ? kLanes + Lane : Lane + Distance)...);
  a = low;
}

// Transposes a square of as many vectors as each has lanes.
template <class V, int Distance = kLanesIn<V> / 2>
PYDENSE_HD void transpose_square(V* v) {
  constexpr int kLanes = kLanesIn<V>;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & Distance) == 0) {
      exchange<V, Distance>(v[i], v[i + Distance], std::make_integer_sequence<int, kLanes>());
    }
  }
  if constexpr (Distance > 1) {
    transpose_square<V, Distance / 2>(v);
  }
}

// The first `count` lanes from memory, 0 in the others.
template <class V, class S>
PYDENSE_HD V load_part(const S* from, int64_t count) {
  S lanes[kLanesIn<V>] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(S));
  return load_as<V>(lanes);
}
template <class V, class S>
PYDENSE_HD void store_part(S* to, const V& v, int64_t count) {
  S lanes[kLanesIn<V>];
  store_as(lanes, v);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(S));
}

template <class T>
inline AxisMap<T> axis_map(const AxisSpec& spec) {
  switch (spec.grid) {
    case AxisGrid::kNearest:
      return nearest_axis<T>(spec.in_size, spec.out_size);
    case AxisGrid::kCrop:
      return crop_axis<T>(spec.in_size, spec.out_size, spec.stride, spec.offset, spec.border);
    default:
      return interpolate_axis<T>(spec.in_size, spec.out_size, spec.grid == AxisGrid::kAlignCorners,
                                 spec.scale_factor);
  }
}

// The taps of all outputs of an axis.
template <class T>
struct AxisTable {
  AxisTable() = default;
  explicit AxisTable(const AxisSpec& spec)
      : weights(buffer_of<T>(static_cast<size_t>(2 * spec.out_size))),
        indices(buffer_of<int32_t>(static_cast<size_t>(2 * spec.out_size))),
        w0(weights.template as<T>()),
        w1(w0 + spec.out_size),
        i0(indices.template as<int32_t>()),
        i1(i0 + spec.out_size) {
    const AxisMap<T> map = axis_map<T>(spec);
    for (int64_t y = 0; y < spec.out_size; ++y) {
      const AxisTaps<T> taps = axis_taps(map, y);
      i0[y] = static_cast<int32_t>(taps.i0);
      i1[y] = static_cast<int32_t>(taps.i1);
      w0[y] = taps.w0;
      w1[y] = taps.w1;
      begin += taps.i0 < 0 ? 1 : 0;
      end += taps.i0 < spec.in_size ? 1 : 0;
    }
  }

  Buffer weights;
  Buffer indices;
  T* w0 = nullptr;
  T* w1 = nullptr;
  int32_t* i0 = nullptr;
  int32_t* i1 = nullptr;
  int64_t begin = 0;  // the outputs that inputs reach: [begin, end)
  int64_t end = 0;
};

}  // namespace pydense::PYDENSE_ISA
