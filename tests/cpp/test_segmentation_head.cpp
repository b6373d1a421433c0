// SPDX-License-Identifier: Apache-2.0
// Argmax, softmax and accumulation against plain loops in double, over types and memory layouts.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/thread_pool.h"
#include "heads.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using namespace testing;  // NOLINT(google-build-using-namespace)

namespace {

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
}

}  // namespace

int main() {
  for (const bool channels_last : {false, true}) {
    test_argmax<float, float>(FloatType::kFloat32, channels_last);
    test_argmax<double, double>(FloatType::kFloat64, channels_last);
    test_argmax<float, BFloat16>(FloatType::kBFloat16, channels_last);
    test_softmax<float>(channels_last);
    test_softmax<double>(channels_last);
  }
  test_accumulate();
  test_errors();
  return report("segmentation_head");
}
