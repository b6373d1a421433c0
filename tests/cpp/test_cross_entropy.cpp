// SPDX-License-Identifier: Apache-2.0
// Cross-entropy and its gradient against plain loops in double, and against itself over threads and
// instruction sets.
#include <cmath>
#include <string>
#include <vector>

#include "common/thread_pool.h"
#include "heads.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using namespace testing;  // NOLINT(google-build-using-namespace)

namespace {

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

void test_errors() {
  const Case c = {1, 300, 2, 2, 4, 4, false};
  const Logits<float> logits(c, FloatType::kFloat32, false, 9);
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
    for (const double smoothing : {0.0, 0.25}) {
      test_cross_entropy<float, float>(FloatType::kFloat32, channels_last, smoothing);
      test_cross_entropy<double, double>(FloatType::kFloat64, channels_last, smoothing);
      test_cross_entropy<float, Half>(FloatType::kFloat16, channels_last, smoothing);
    }
  }
  test_same_bits<float>();
  test_same_bits<double>();
  test_errors();
  return report("cross_entropy");
}
