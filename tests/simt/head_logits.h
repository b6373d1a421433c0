// SPDX-License-Identifier: Apache-2.0
// What the drivers of the segmentation heads share: logits of any type in any layout, and the same
// upsampled in double.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "driver.h"
#include "segmentation_head/segmentation_head.h"

namespace simt {

enum class Layout { kContiguous, kChannelsLast, kGaps };

struct HeadCase {
  int64_t images;
  int64_t classes;
  int64_t height;
  int64_t width;
  int64_t out_height;
  int64_t out_width;
  bool align_corners;
  Layout layout;
};

template <class S>
constexpr pydense::FloatType kFloatType = pydense::FloatType::kFloat32;
template <>
constexpr pydense::FloatType kFloatType<double> = pydense::FloatType::kFloat64;
template <>
constexpr pydense::FloatType kFloatType<__half> = pydense::FloatType::kFloat16;
template <>
constexpr pydense::FloatType kFloatType<__nv_bfloat16> = pydense::FloatType::kBFloat16;

template <class L>
constexpr pydense::IntegerType kIntegerType = pydense::IntegerType::kInt64;
template <>
constexpr pydense::IntegerType kIntegerType<uint8_t> = pydense::IntegerType::kUInt8;
template <>
constexpr pydense::IntegerType kIntegerType<int8_t> = pydense::IntegerType::kInt8;
template <>
constexpr pydense::IntegerType kIntegerType<int16_t> = pydense::IntegerType::kInt16;
template <>
constexpr pydense::IntegerType kIntegerType<int32_t> = pydense::IntegerType::kInt32;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Strides of [images, classes, height, width]; with gaps, every second element of a row is unused.
inline std::array<int64_t, 4> strides_of(int64_t classes, int64_t height, int64_t width,
                                         Layout layout) {
  if (layout == Layout::kChannelsLast) {
    return {classes * height * width, 1, width * classes, classes};
  }
  const int64_t step = layout == Layout::kGaps ? 2 : 1;
  return {classes * height * width * step, height * width * step, width * step, step};
}

template <class T>
pydense::HeadAxes<T> axes_of(const HeadCase& c) {
  namespace math = pydense::portable;
  return {math::interpolate_axis<T>(c.height, c.out_height, c.align_corners, 0),
          math::interpolate_axis<T>(c.width, c.out_width, c.align_corners, 0)};
}

// An array [images, classes, height, width].
template <class S>
class Array {
 public:
  Array(int64_t images, int64_t classes, int64_t height, int64_t width, Layout layout,
        const char* name)
      : strides_(strides_of(classes, height, width, layout)),
        size_{images, classes, height, width},
        memory_(static_cast<size_t>(images * strides_[0]), name) {}

  S& at(int64_t n, int64_t c, int64_t y, int64_t x) {
    return memory_[static_cast<size_t>(offset(n, c, y, x))];
  }
  double value(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<double>(
        pydense::to_accumulate(memory_[static_cast<size_t>(offset(n, c, y, x))]));
  }
  void set(int64_t n, int64_t c, int64_t y, int64_t x, double value) {
    at(n, c, y, x) = pydense::from_accumulate<S>(static_cast<pydense::Accumulate<S>>(value));
  }
  S* data() { return memory_.data(); }
  const std::array<int64_t, 4>& strides() const { return strides_; }
  const std::array<int64_t, 4>& size() const { return size_; }

  // Multiples of 1/64 in [-scale, scale], the same numbers in every layout.
  void fill(uint64_t seed, double scale) {
    const std::vector<double> values =
        random_values(static_cast<size_t>(size_[0] * size_[1] * size_[2] * size_[3]), seed, 1);
    size_t i = 0;
    for (int64_t n = 0; n < size_[0]; ++n) {
      for (int64_t c = 0; c < size_[1]; ++c) {
        for (int64_t y = 0; y < size_[2]; ++y) {
          for (int64_t x = 0; x < size_[3]; ++x) {
            set(n, c, y, x, std::round(values[i++] * scale * 64) / 64);
          }
        }
      }
    }
  }

 private:
  int64_t offset(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return n * strides_[0] + c * strides_[1] + y * strides_[2] + x * strides_[3];
  }

  std::array<int64_t, 4> strides_;
  std::array<int64_t, 4> size_;
  Buffer<S> memory_;
};

template <class S>
struct Logits : Array<S> {
  HeadCase size;

  explicit Logits(const HeadCase& c, double scale = 4)
      : Array<S>(c.images, c.classes, c.height, c.width, c.layout, "logits"), size(c) {
    this->fill(5, scale);
  }

  pydense::LogitsView view() {
    pydense::LogitsView view = {this->data(), kFloatType<S>, size.images, size.classes,
                                size.height,  size.width,    {}};
    std::copy_n(this->strides().begin(), 4, view.strides);
    return view;
  }

  // The classes of one output; where the taps are is that of T.
  std::vector<double> upsampled(int64_t n, int64_t y, int64_t x) const {
    using T = pydense::Accumulate<S>;
    const pydense::HeadAxes<T> axes = axes_of<T>(size);
    const auto row = pydense::portable::axis_taps(axes.y, y);
    const auto column = pydense::portable::axis_taps(axes.x, x);
    std::vector<double> values;
    for (int64_t c = 0; c < size.classes; ++c) {
      const auto across = [&](int64_t i) {
        return static_cast<double>(column.w0) * this->value(n, c, i, column.i0) +
               static_cast<double>(column.w1) * this->value(n, c, i, column.i1);
      };
      values.push_back(static_cast<double>(row.w0) * across(row.i0) +
                       static_cast<double>(row.w1) * across(row.i1));
    }
    return values;
  }
};

inline std::vector<double> softmax(std::vector<double> values) {
  const double largest = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (double& value : values) {
    value = std::exp(value - largest);
    sum += value;
  }
  for (double& value : values) {
    value /= sum;
  }
  return values;
}

// One image more than a grid has blocks, and once past 2^31, so that block 0 takes the last one,
// too. All are zeros but that: its second class is 1.
struct ManyImages {
  HeadCase size = {images(), 2, 2, 3, 3, 4, false, Layout::kContiguous};
  SparseMemory memory{static_cast<size_t>(size.images) * 12 * 4};
  pydense::LogitsView view = {
      memory.as<float>(), pydense::FloatType::kFloat32, size.images, 2, 2, 3, {12, 6, 3, 1}};

  static int64_t images() {
    const bool far = this_build() == kRelease && config().order == Order::kForward;
    return (int64_t{1} << (far ? 31 : 20)) + 1;
  }
  ManyImages() { std::fill_n(memory.as<float>() + (size.images - 1) * 12 + 6, 6, 1.0F); }
};

inline Limits limits_of(const char* kernel, double minimum_bytes, const char* shape, double scale) {
  Limits limits{.kernel = kernel, .minimum_bytes = minimum_bytes};
  limits.shape = shape;
  limits.scale = scale;
  return limits;
}

constexpr HeadCase kCounted = {1, 19, 8, 64, 32, 256, false, Layout::kContiguous};
constexpr double kCountedScale = 1024.0 * 2048.0 / (32.0 * 256.0);

// Calls fn(image, row, column) for every output.
template <class Fn>
void for_each_output(const HeadCase& c, const Fn& fn) {
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t y = 0; y < c.out_height; ++y) {
      for (int64_t x = 0; x < c.out_width; ++x) {
        fn(n, y, x);
      }
    }
  }
}

}  // namespace simt
