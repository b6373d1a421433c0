// SPDX-License-Identifier: Apache-2.0
// Where an output of an upsampling lies between the inputs, along one axis; shared by CPU and CUDA
// and by all operators that upsample. An output is w0 x[i0] + w1 x[i1].
//
//   kHalfPixel     src = step (y + 1/2) - 1/2, not below 0       F.interpolate, align_corners=False
//   kAlignCorners  src = step y                                  F.interpolate, align_corners=True
//   kIdentity      src = y                                       F.interpolate, equal sizes
//   kNearest       src = floor(step y)                           F.interpolate, mode="nearest"
//   kCrop          src = (y + start + fraction) / stride         Caffe's Deconvolution + Crop
//
// In float, the first four are bitwise those of ATen's CPU kernels on machines with fused
// multiply-add, whose compiler contracts the half-pixel formula and nothing else: here that fma is
// written out, and no other may form. kNearest is computed in float for every type, as by ATen. (In
// double, ATen takes some floors of the others in float; not so here.) kCrop is decided in integers
// and exact for any size.
//
// T is the type of the arithmetic: float for float and 16-bit tensors, double for double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/hd.h"
#include "common/isa_namespace.h"

namespace pydense {

enum class AxisGrid : int32_t { kHalfPixel, kAlignCorners, kIdentity, kNearest, kCrop };

// What lies beyond the ends of the input, for kCrop; the other grids do not reach there.
enum class AxisBorder : int32_t { kZeros, kClamp };

template <class T>
struct AxisMap {
  AxisGrid grid;
  AxisBorder border;
  int64_t in_size;  // at least 1, as out_size; both below 2^48
  int64_t out_size;
  T step;          // inputs per output; not for kIdentity and kCrop
  int64_t stride;  // kCrop alone: outputs per input,
  int64_t start;   // and the offset in outputs, its whole part
  T fraction;      // and the rest, in [0, 1)
};

template <class T>
struct AxisTaps {
  int64_t i0;  // i0 <= i1 <= i0 + 1, and neither falls as y grows
  int64_t i1;
  T w0;
  T w1;
};

struct AxisRange {
  int64_t begin;
  int64_t end;
};

}  // namespace pydense

namespace pydense::PYDENSE_ISA {

// Products, fused products and quotients that no compiler may contract further.
#if defined(__CUDA_ARCH__)
PYDENSE_HD float exact_mul(float a, float b) { return __fmul_rn(a, b); }
PYDENSE_HD double exact_mul(double a, double b) { return __dmul_rn(a, b); }
PYDENSE_HD float exact_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PYDENSE_HD double exact_fma(double a, double b, double c) { return __fma_rn(a, b, c); }
PYDENSE_HD float exact_div(float a, float b) { return __fdiv_rn(a, b); }
PYDENSE_HD double exact_div(double a, double b) { return __ddiv_rn(a, b); }
#else
template <class T>
PYDENSE_HD T exact_mul(T a, T b) {
  return a * b;
}
PYDENSE_HD float exact_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PYDENSE_HD double exact_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class T>
PYDENSE_HD T exact_div(T a, T b) {
  return a / b;
}
#endif

// The axis of F.interpolate(mode="bilinear"). scale_factor is the one the user gave, else 0.
template <class T>
inline AxisMap<T> interpolate_axis(int64_t in_size, int64_t out_size, bool align_corners,
                                   double scale_factor) {
  AxisMap<T> map{};
  map.border = AxisBorder::kClamp;
  map.in_size = in_size;
  map.out_size = out_size;
  if (in_size == out_size) {  // whatever the scale factor
    map.grid = AxisGrid::kIdentity;
    map.step = 1;
  } else if (align_corners) {
    map.grid = AxisGrid::kAlignCorners;
    map.step = out_size > 1 ? static_cast<T>(in_size - 1) / static_cast<T>(out_size - 1) : T{};
  } else {
    map.grid = AxisGrid::kHalfPixel;
    map.step = scale_factor > 0 ? static_cast<T>(1.0 / scale_factor)
                                : static_cast<T>(in_size) / static_cast<T>(out_size);
  }
  return map;
}

// The axis of F.interpolate(mode="nearest", size=...).
template <class T>
inline AxisMap<T> nearest_axis(int64_t in_size, int64_t out_size) {
  AxisMap<T> map{};
  map.grid = AxisGrid::kNearest;
  map.border = AxisBorder::kClamp;
  map.in_size = in_size;
  map.out_size = out_size;
  map.step = static_cast<float>(in_size) / static_cast<float>(out_size);
  return map;
}

// src = (y + offset) / stride; |offset| below 2^48.
template <class T>
inline AxisMap<T> crop_axis(int64_t in_size, int64_t out_size, int64_t stride, double offset,
                            AxisBorder border) {
  AxisMap<T> map{};
  map.grid = AxisGrid::kCrop;
  map.border = border;
  map.in_size = in_size;
  map.out_size = out_size;
  map.stride = stride;
  const double whole = std::floor(offset);
  map.start = static_cast<int64_t>(whole);
  map.fraction = static_cast<T>(offset - whole);
  if (map.fraction >= 1) {  // rounded up
    map.start += 1;
    map.fraction = 0;
  }
  return map;
}

// One tap as two halves of the same: w0 x + w1 x is x for a weight of 1, an infinity included,
// which 1 x + 0 x is not. (Half of an odd subnormal number is rounded to its even neighbour.)
template <class T>
PYDENSE_HD AxisTaps<T> one_tap(int64_t i, T weight) {
  return {i, i, weight / 2, weight / 2};
}

template <class T>
PYDENSE_HD AxisTaps<T> crop_taps(const AxisMap<T>& map, int64_t y) {
  const int64_t position = y + map.start;
  int64_t i = position / map.stride;
  i -= i * map.stride > position ? 1 : 0;  // division rounds to 0, this to minus infinity
  const int64_t last = map.in_size - 1;
  const int64_t rest = position - i * map.stride;
  const bool between = rest > 0 || map.fraction > 0;
  const T t = exact_div(static_cast<T>(rest) + map.fraction, static_cast<T>(map.stride));
  if (i >= 0 && i < last) {
    return between ? AxisTaps<T>{i, i + 1, T{1} - t, t} : one_tap(i, T{1});
  }
  if (map.border == AxisBorder::kClamp) {
    return one_tap(i < 0 ? int64_t{0} : last, T{1});
  }
  if (i == last) {
    return one_tap(last, T{1} - t);
  }
  if (i == -1 && between) {
    return one_tap(int64_t{0}, t);
  }
  return {i < 0 ? int64_t{-1} : map.in_size, i < 0 ? int64_t{-1} : map.in_size, T{}, T{}};
}

// The taps of output y. With kCrop and kZeros, i0 = i1 is -1 or in_size where no input reaches y:
// the output is 0. In all other cases both taps are inputs. A tap that is not there takes no part,
// so that no 0 * inf arises from it; but F.interpolate's formula is kept where its second weight is
// 0.
template <class T>
PYDENSE_HD AxisTaps<T> axis_taps(const AxisMap<T>& map, int64_t y) {
  if (map.grid == AxisGrid::kCrop) {
    return crop_taps(map, y);
  }
  if (map.grid == AxisGrid::kIdentity) {
    return {y, y, T{1}, T{}};
  }
  const int64_t last = map.in_size - 1;
  if (map.grid == AxisGrid::kNearest) {
    const float src = exact_mul(static_cast<float>(map.step), static_cast<float>(y));
    const int64_t i = src < static_cast<float>(last) ? static_cast<int64_t>(src) : last;
    return one_tap(i < last ? i : last, T{1});
  }
  T src;
  if (map.grid == AxisGrid::kHalfPixel) {
    constexpr T kHalf = 0.5;
    src = exact_fma(map.step, static_cast<T>(y) + kHalf, -kHalf);
    src = src > 0 ? src : T{};
  } else {
    src = exact_mul(map.step, static_cast<T>(y));
  }
  // Compared first: a tiny scale factor may put src beyond all integers. src is not negative.
  const int64_t whole = src < static_cast<T>(last) ? static_cast<int64_t>(src) : last;
  const int64_t i = whole < last ? whole : last;
  T t = src - static_cast<T>(i);
  t = t < 1 ? t : T{1};
  return {i, i < last ? i + 1 : last, T{1} - t, t};
}

template <class T>
PYDENSE_HD bool is_inside(const AxisMap<T>& map, const AxisTaps<T>& taps) {
  return taps.i0 >= 0 && taps.i0 < map.in_size;
}

// The weight that output y gives input i.
template <class T>
PYDENSE_HD T tap_weight(const AxisTaps<T>& taps, int64_t i) {
  return (taps.i0 == i ? taps.w0 : T{}) + (taps.i1 == i ? taps.w1 : T{});
}

// About which output lies at `src`, in [0, out_size].
template <class T>
PYDENSE_HD int64_t estimate_output(const AxisMap<T>& map, double src) {
  double y = src;
  if (map.grid == AxisGrid::kCrop) {
    y = src * static_cast<double>(map.stride) - static_cast<double>(map.start) -
        static_cast<double>(map.fraction);
  } else if (map.grid == AxisGrid::kHalfPixel) {
    y = (src + 0.5) / static_cast<double>(map.step) - 0.5;
  } else if (map.grid != AxisGrid::kIdentity && src > 0) {
    y = src / static_cast<double>(map.step);  // infinite where there is one output
  }
  const auto size = static_cast<double>(map.out_size);
  y = y < size ? y : size;
  return static_cast<int64_t>(y > 0 ? y : 0.0);
}

// The outputs that input i takes part in, for kernels that gather without a table of taps (as on a
// GPU, where each thread owns an input). Taps never fall as y grows, so they are one range; the
// estimate is off by an output or two at most, and corrected by looking.
template <class T>
PYDENSE_HD AxisRange outputs_of_input(const AxisMap<T>& map, int64_t i) {
  int64_t begin = estimate_output(map, static_cast<double>(i - 1));
  while (begin > 0 && axis_taps(map, begin - 1).i1 >= i) {
    --begin;
  }
  while (begin < map.out_size && axis_taps(map, begin).i1 < i) {
    ++begin;
  }
  int64_t end = estimate_output(map, static_cast<double>(i + 1));
  end = end > begin ? end : begin;
  while (end > begin && axis_taps(map, end - 1).i0 > i) {
    --end;
  }
  while (end < map.out_size && axis_taps(map, end).i0 <= i) {
    ++end;
  }
  return {begin, end};
}

}  // namespace pydense::PYDENSE_ISA
