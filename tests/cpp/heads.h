// SPDX-License-Identifier: Apache-2.0
// Small logits, upsampled by a plain loop in double. Arrays are of exact size and begin as NaN, so
// that sanitizers and comparisons see a step outside.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "common/half.h"
#include "segmentation_head/segmentation_head.h"

namespace testing {

using namespace pydense;  // NOLINT(google-build-using-namespace)

struct Case {
  int64_t images;
  int64_t classes;
  int64_t height;
  int64_t width;
  int64_t out_height;
  int64_t out_width;
  bool align_corners;
};

inline const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, false},    {2, 3, 4, 5, 17, 23, false},  {1, 21, 9, 7, 65, 33, true},
    {1, 5, 20, 30, 7, 11, false}, {2, 17, 6, 33, 6, 66, false}, {1, 40, 5, 40, 20, 161, true},
    {1, 2, 3, 2, 40, 300, false}, {1, 16, 8, 8, 8, 8, false},   {3, 7, 1, 9, 5, 9, true},
};

// Logits of any type in memory, contiguous or channels last.
template <class S>
struct Logits {
  Case size;
  std::vector<S> memory;
  LogitsView view;

  Logits(const Case& c, FloatType type, bool channels_last, unsigned seed) : size(c) {
    const int64_t pixels = c.height * c.width;
    memory.resize(static_cast<size_t>(c.images * c.classes * pixels));
    view = {memory.data(), type, c.images, c.classes, c.height, c.width, {}};
    const int64_t row = channels_last ? c.width * c.classes : c.width;
    const int64_t strides[] = {c.classes * pixels, channels_last ? 1 : pixels, row,
                               channels_last ? c.classes : 1};
    std::copy_n(strides, 4, view.strides);
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int> whole(-512, 512);
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t k = 0; k < c.classes * pixels; ++k) {
        const float value = static_cast<float>(whole(generator)) / 64;
        S& to =
            memory[static_cast<size_t>(offset(n, k / pixels, k % pixels / c.width, k % c.width))];
        if constexpr (sizeof(S) == 2) {
          portable::store_as(&to, value);
        } else {
          to = value;
        }
      }
    }
  }
  int64_t offset(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return n * view.strides[0] + c * view.strides[1] + y * view.strides[2] + x * view.strides[3];
  }
  double at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    const S* from = memory.data() + offset(n, c, y, x);
    if constexpr (sizeof(S) == 2) {
      return static_cast<double>(portable::load_as<float>(from));
    } else {
      return static_cast<double>(*from);
    }
  }
};

// Upsampled values of one output pixel, and where they come from.
struct Pixel {
  std::vector<double> values;
  AxisTaps<double> y;
  AxisTaps<double> x;
};

template <class S>
Pixel upsample(const Logits<S>& logits, int64_t n, int64_t y, int64_t x) {
  const Case& c = logits.size;
  Pixel pixel;
  pixel.y = portable::axis_taps(
      portable::interpolate_axis<double>(c.height, c.out_height, c.align_corners, 0), y);
  pixel.x = portable::axis_taps(
      portable::interpolate_axis<double>(c.width, c.out_width, c.align_corners, 0), x);
  for (int64_t k = 0; k < c.classes; ++k) {
    const auto row = [&](int64_t i) {
      return pixel.x.w0 * logits.at(n, k, i, pixel.x.i0) +
             pixel.x.w1 * logits.at(n, k, i, pixel.x.i1);
    };
    pixel.values.push_back(pixel.y.w0 * row(pixel.y.i0) + pixel.y.w1 * row(pixel.y.i1));
  }
  return pixel;
}

// Logarithm of the sum of the exponentials.
inline double log_sum(const std::vector<double>& values) {
  const double largest = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (const double value : values) {
    sum += std::exp(value - largest);
  }
  return largest + std::log(sum);
}

template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? 1e-12 : 1e-4;

template <class T>
struct CrossEntropy {
  CrossEntropySums sums;
  std::vector<T> loss;
  std::vector<T> gradient;
};

struct Targets {
  std::vector<int16_t> labels;
  std::vector<float> weight;
  std::vector<float> pixel_weight;

  Targets(const Case& c, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int> label(-1, static_cast<int>(c.classes) - 1);
    std::uniform_real_distribution<float> factor(0.5F, 2);
    const int64_t pixels = c.images * c.out_height * c.out_width;
    for (int64_t i = 0; i < pixels; ++i) {
      labels.push_back(static_cast<int16_t>(label(generator)));
      pixel_weight.push_back(factor(generator));
    }
    for (int64_t k = 0; k < c.classes; ++k) {
      weight.push_back(factor(generator));
    }
  }
};

template <class T, class S>
CrossEntropy<T> cross_entropy(const Logits<S>& logits, const Targets& targets, double smoothing,
                              bool channels_last, ParallelFor parallel_for) {
  const Case& c = logits.size;
  const AxisTable<T> y(interpolation_axis(c.height, c.out_height, c.align_corners));
  const AxisTable<T> x(interpolation_axis(c.width, c.out_width, c.align_corners));
  const std::vector<T> weight(targets.weight.begin(), targets.weight.end());
  const std::vector<T> factors(targets.pixel_weight.begin(), targets.pixel_weight.end());
  const int64_t area = c.out_height * c.out_width;
  CrossEntropy<T> out;
  out.loss.resize(static_cast<size_t>(c.images * area));
  out.gradient.assign(logits.memory.size(), std::numeric_limits<T>::quiet_NaN());
  out.sums = upsample_cross_entropy<T>({{logits.view,
                                         targets.labels.data(),
                                         IntegerType::kInt16,
                                         {area, c.out_width, 1},
                                         -1,
                                         weight.data(),
                                         factors.data(),
                                         {area, c.out_width, 1},
                                         smoothing,
                                         out.loss.data(),
                                         out.gradient.data(),
                                         channels_last,
                                         true},
                                        &y,
                                        &x},
                                       parallel_for);
  return out;
}

}  // namespace testing
