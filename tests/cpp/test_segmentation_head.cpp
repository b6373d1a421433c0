// SPDX-License-Identifier: Apache-2.0
// Segmentation heads against plain loops in double, over memory layouts, threads and instruction
// sets. Arrays stand in blocks of NaN and of exact size, so that sanitizers see a step outside.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/half.h"
#include "common/thread_pool.h"
#include "segmentation_head/segmentation_head.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::thread_for;

namespace {

struct Case {
  int64_t images;
  int64_t classes;
  int64_t height;
  int64_t width;
  int64_t out_height;
  int64_t out_width;
  bool align_corners;
};

const Case kCases[] = {
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
double log_sum(const std::vector<double>& values) {
  const double largest = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (const double value : values) {
    sum += std::exp(value - largest);
  }
  return largest + std::log(sum);
}

template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? 1e-12 : 1e-4;

template <class T, class S>
void test_argmax(FloatType type, bool channels_last) {
  for (const Case& c : kCases) {
    const Logits<S> logits(c, type, channels_last, 1);
    const AxisTable<T> y(interpolation_axis(c.height, c.out_height, c.align_corners));
    const AxisTable<T> x(interpolation_axis(c.width, c.out_width, c.align_corners));
    const auto pixels = static_cast<size_t>(c.images * c.out_height * c.out_width);
    std::vector<uint8_t> small(pixels);
    std::vector<int32_t> labels(pixels);
    std::vector<T> confidence(pixels);
    upsample_argmax<T>({logits.view, &y, &x, small.data(), IntegerType::kUInt8, nullptr},
                       thread_for);
    upsample_argmax<T>({logits.view, &y, &x, labels.data(), IntegerType::kInt32, confidence.data()},
                       pool_parallel_for);
    size_t at = 0;
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t i = 0; i < c.out_height * c.out_width; ++i, ++at) {
        const std::vector<double> values =
            upsample(logits, n, i / c.out_width, i % c.out_width).values;
        const auto label = static_cast<size_t>(labels[at]);
        EXPECT(small[at] == labels[at]);
        EXPECT(*std::max_element(values.begin(), values.end()) - values[label] <= kTolerance<T>);
        const double sure = std::exp(values[label] - log_sum(values));
        EXPECT(std::fabs(static_cast<double>(confidence[at]) - sure) <= kTolerance<T>);
      }
    }
  }
}

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
  out.sums = upsample_cross_entropy<T>({logits.view,
                                        &y,
                                        &x,
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
                                       parallel_for);
  return out;
}

template <class T, class S>
void test_cross_entropy(FloatType type, bool channels_last, double smoothing) {
  for (const Case& c : kCases) {
    const Logits<S> logits(c, type, channels_last, 2);
    const Targets targets(c, 3);
    const CrossEntropy<T> got =
        cross_entropy<T>(logits, targets, smoothing, channels_last, thread_for);
    std::vector<double> gradient(logits.memory.size());
    double loss = 0;
    double weights = 0;
    int64_t valid = 0;
    size_t at = 0;
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t i = 0; i < c.out_height * c.out_width; ++i, ++at) {
        if (targets.labels[at] < 0) {
          EXPECT(got.loss[at] == 0);
          continue;
        }
        const Pixel pixel = upsample(logits, n, i / c.out_width, i % c.out_width);
        const double sum = log_sum(pixel.values);
        double own = 0;
        std::vector<double> slope(pixel.values.size());
        for (size_t k = 0; k < slope.size(); ++k) {
          const bool hit = static_cast<size_t>(targets.labels[at]) == k;
          const double factor =
              static_cast<double>(targets.pixel_weight[at]) *
              static_cast<double>(targets.weight[k]) *
              ((hit ? 1 - smoothing : 0.0) + smoothing / static_cast<double>(c.classes));
          own += factor * (sum - pixel.values[k]);
          for (size_t j = 0; j < slope.size(); ++j) {
            slope[j] += factor * (std::exp(pixel.values[j] - sum) - (j == k ? 1 : 0));
          }
        }
        for (size_t k = 0; k < slope.size(); ++k) {
          const auto add = [&](int64_t y, int64_t x, double w) {
            gradient[static_cast<size_t>(logits.offset(n, static_cast<int64_t>(k), y, x))] +=
                w * slope[k];
          };
          add(pixel.y.i0, pixel.x.i0, pixel.y.w0 * pixel.x.w0);
          add(pixel.y.i0, pixel.x.i1, pixel.y.w0 * pixel.x.w1);
          add(pixel.y.i1, pixel.x.i0, pixel.y.w1 * pixel.x.w0);
          add(pixel.y.i1, pixel.x.i1, pixel.y.w1 * pixel.x.w1);
        }
        EXPECT(std::fabs(static_cast<double>(got.loss[at]) - own) <= kTolerance<T> * (1 + own));
        loss += own;
        weights += static_cast<double>(targets.pixel_weight[at]) *
                   static_cast<double>(targets.weight[static_cast<size_t>(targets.labels[at])]);
        ++valid;
      }
    }
    EXPECT(std::fabs(got.sums.loss - loss) <= kTolerance<T> * (1 + loss));
    EXPECT(std::fabs(got.sums.weight - weights) <= kTolerance<T> * (1 + weights));
    EXPECT(got.sums.valid == valid && got.sums.correct <= valid);
    const double most = static_cast<double>(at) / static_cast<double>(c.height * c.width);
    for (size_t k = 0; k < gradient.size(); ++k) {
      const double off = std::fabs(static_cast<double>(got.gradient[k]) - gradient[k]);
      EXPECT(off <= kTolerance<T> * (1 + most));
    }
  }
}

template <class T>
void test_same_bits() {
  const Case c = {2, 23, 19, 21, 77, 190, false};
  const FloatType type = sizeof(T) == 8 ? FloatType::kFloat64 : FloatType::kFloat32;
  const Logits<T> logits(c, type, false, 4);
  const Targets targets(c, 5);
  const std::string before = cpu_isa_name(current_cpu_isa());
  CrossEntropy<T> fused;
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(cpu_isa_name(isa));
    const CrossEntropy<T> first = cross_entropy<T>(logits, targets, 0.1, false, serial_for);
    for (const ParallelFor parallel_for : {serial_for, thread_for, pool_parallel_for}) {
      const CrossEntropy<T> other = cross_entropy<T>(logits, targets, 0.1, false, parallel_for);
      EXPECT(other.gradient == first.gradient && other.loss == first.loss);
      EXPECT(other.sums.loss == first.sums.loss && other.sums.weight == first.sums.weight);
    }
    if (isa != CpuIsa::kBaseline) {
      EXPECT(fused.loss.empty() ||
             (fused.gradient == first.gradient && fused.sums.loss == first.sums.loss));
      fused = first;
    }
  }
  set_cpu_isa(before);
}

// The gradient of a softmax is that of the cross-entropy where the upstream gradient is -1 / p at
// the target; the forward pass gives the p.
template <class T>
void test_softmax(bool channels_last) {
  const FloatType type = sizeof(T) == 8 ? FloatType::kFloat64 : FloatType::kFloat32;
  for (const Case& c : kCases) {
    const Logits<T> logits(c, type, channels_last, 6);
    const AxisTable<T> y(interpolation_axis(c.height, c.out_height, c.align_corners));
    const AxisTable<T> x(interpolation_axis(c.width, c.out_width, c.align_corners));
    const int64_t area = c.out_height * c.out_width;
    std::vector<T> out(static_cast<size_t>(c.images * c.classes * area));
    UpsampleSoftmaxArgs<T> args{
        logits.view, &y,      &x,      {c.classes * area, area, c.out_width, 1},
        out.data(),  nullptr, nullptr, channels_last};
    if (channels_last) {
      args.full_strides[1] = 1;
      args.full_strides[2] = c.out_width * c.classes;
      args.full_strides[3] = c.classes;
    }
    upsample_softmax(args, thread_for);
    Targets targets(c, 7);
    std::fill(targets.weight.begin(), targets.weight.end(), 1.0F);
    std::fill(targets.pixel_weight.begin(), targets.pixel_weight.end(), 1.0F);
    std::vector<T> upstream(out.size());
    size_t at = 0;
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t i = 0; i < area; ++i, ++at) {
        const std::vector<double> values =
            upsample(logits, n, i / c.out_width, i % c.out_width).values;
        for (int64_t k = 0; k < c.classes; ++k) {
          const auto place = static_cast<size_t>(
              n * args.full_strides[0] + k * args.full_strides[1] +
              i / c.out_width * args.full_strides[2] + i % c.out_width * args.full_strides[3]);
          const double p = std::exp(values[static_cast<size_t>(k)] - log_sum(values));
          EXPECT(std::fabs(static_cast<double>(out[place]) - p) <= kTolerance<T>);
          upstream[place] = targets.labels[at] == k ? -1 / out[place] : T{};
        }
      }
    }
    std::vector<T> gradient(logits.memory.size(), std::numeric_limits<T>::quiet_NaN());
    args.out = nullptr;
    args.full_gradient = upstream.data();
    args.gradient = gradient.data();
    upsample_softmax(args, thread_for);
    const CrossEntropy<T> other = cross_entropy<T>(logits, targets, 0, channels_last, serial_for);
    for (size_t k = 0; k < gradient.size(); ++k) {
      const double off = static_cast<double>(gradient[k]) - static_cast<double>(other.gradient[k]);
      EXPECT(std::fabs(off) <= kTolerance<T> * (1 + static_cast<double>(area) /
                                                        static_cast<double>(c.height * c.width)));
    }
  }
}

void test_accumulate() {
  for (const Case& c : kCases) {
    const Logits<Half> logits(c, FloatType::kFloat16, false, 8);
    const AxisTable<float> y(interpolation_axis(c.height, c.out_height, c.align_corners));
    const AxisTable<float> x(interpolation_axis(c.width, c.out_width, c.align_corners));
    const int64_t area = c.out_height * c.out_width;
    std::vector<float> out(static_cast<size_t>(c.images * c.classes * area), 1.0F);
    const float weight = 0.5F;
    upsample_accumulate<float>({logits.view,
                                &y,
                                &x,
                                out.data(),
                                {c.classes * area, area, c.out_width, 1},
                                &weight,
                                {0, 0}},
                               thread_for);
    size_t at = 0;
    for (int64_t n = 0; n < c.images; ++n) {
      for (int64_t k = 0; k < c.classes; ++k) {
        for (int64_t i = 0; i < area; ++i, ++at) {
          const double value =
              upsample(logits, n, i / c.out_width, i % c.out_width).values[static_cast<size_t>(k)];
          EXPECT(std::fabs(static_cast<double>(out[at]) - 1 - value / 2) <= kTolerance<float>);
        }
      }
    }
  }
}

void test_errors() {
  const Case c = {1, 300, 2, 2, 4, 4, false};
  const Logits<float> logits(c, FloatType::kFloat32, false, 9);
  const AxisTable<float> axis(interpolation_axis(2, 4, false));
  std::vector<uint8_t> labels(16);
  EXPECT_THROWS(
      upsample_argmax<float>(
          {logits.view, &axis, &axis, labels.data(), IntegerType::kUInt8, nullptr}, serial_for),
      "upsample_argmax: dtype must hold 300 classes, got uint8");
  EXPECT_THROWS(AxisTable<float>(interpolation_axis(0, 4, false)),
                "sizes must be in [1, 2147483583], got 0 to 4");
  Targets targets(c, 1);
  targets.labels[5] = 300;
  EXPECT_THROWS(cross_entropy<float>(logits, targets, 0, false, serial_for),
                "upsample_cross_entropy: target must be in [0, 300) or ignore_index -1, got 300");
  EXPECT_THROWS(cross_entropy<float>(logits, targets, 2, false, serial_for),
                "label_smoothing must be in [0, 1], got 2");
}

}  // namespace

int main() {
  for (const bool channels_last : {false, true}) {
    test_argmax<float, float>(FloatType::kFloat32, channels_last);
    test_argmax<double, double>(FloatType::kFloat64, channels_last);
    test_argmax<float, BFloat16>(FloatType::kBFloat16, channels_last);
    for (const double smoothing : {0.0, 0.25}) {
      test_cross_entropy<float, float>(FloatType::kFloat32, channels_last, smoothing);
      test_cross_entropy<double, double>(FloatType::kFloat64, channels_last, smoothing);
      test_cross_entropy<float, Half>(FloatType::kFloat16, channels_last, smoothing);
    }
    test_softmax<float>(channels_last);
    test_softmax<double>(channels_last);
  }
  test_same_bits<float>();
  test_same_bits<double>();
  test_accumulate();
  test_errors();
  return testing::report("segmentation_head");
}
