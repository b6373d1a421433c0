// SPDX-License-Identifier: Apache-2.0
// The exact Gaussian filter against a plain double loop, and against itself over threads,
// instruction sets and memory layouts.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/simd.h"
#include "common/thread_pool.h"
#include "dense_crf/exact_filter.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::thread_for;

namespace {

struct Case {
  int64_t batches;
  int64_t feature_batches;
  int64_t channels;
  int64_t points;
  int64_t dims;
  bool self_term;
};

enum class Layout { kContiguous, kPointsOuter, kReversed };

// An array of logical shape [a, b, points] somewhere in a larger block of NaN.
template <class T>
struct Array {
  std::vector<T> memory;
  std::array<int64_t, 3> shape;
  int64_t strides[3];
  int64_t first;

  Array(int64_t a, int64_t b, int64_t points, Layout layout) : shape{a, b, points} {
    const int64_t gap = layout == Layout::kPointsOuter ? b + 3 : 1;
    const int64_t row = points + 5;
    switch (layout) {
      case Layout::kPointsOuter:
        std::copy_n(std::array{points * gap, int64_t{1}, gap}.data(), 3, strides);
        first = 2;
        break;
      case Layout::kReversed:
        std::copy_n(std::array{-b * row, -row, int64_t{-1}}.data(), 3, strides);
        first = a * b * row - 1;
        break;
      default:
        std::copy_n(std::array{b * row, row, int64_t{1}}.data(), 3, strides);
        first = 3;
    }
    memory.assign(static_cast<size_t>(a * std::max(b * row, points * gap) + 8),
                  std::numeric_limits<T>::quiet_NaN());
  }
  T& at(int64_t i, int64_t j, int64_t p) {
    return memory[static_cast<size_t>(first + i * strides[0] + j * strides[1] + p * strides[2])];
  }
  const T* data() const { return memory.data() + first; }
  void fill(T scale, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<T> uniform(-scale, scale);
    for (int64_t i = 0; i < shape[0]; ++i) {
      for (int64_t j = 0; j < shape[1]; ++j) {
        for (int64_t p = 0; p < shape[2]; ++p) {
          at(i, j, p) = uniform(generator);
        }
      }
    }
  }
};

template <class T>
struct Problem {
  Case size;
  Array<T> features;
  Array<T> values;

  explicit Problem(const Case& c, Layout layout = Layout::kContiguous, T scale = 2)
      : size(c),
        features(c.feature_batches, c.dims, c.points, layout),
        values(c.batches, c.channels, c.points, layout) {
    features.fill(scale / std::sqrt(static_cast<T>(c.dims)), 1);
    values.fill(1, 2);
  }

  ExactFilterArgs<T> args(T* out) const {
    ExactFilterArgs<T> a{
        features.data(), values.data(), out, size.batches, size.feature_batches, size.channels,
        size.points,     size.dims,     {},  {},           size.self_term};
    std::copy_n(features.strides, 3, a.feature_strides);
    std::copy_n(values.strides, 3, a.value_strides);
    return a;
  }

  std::vector<T> filter(ParallelFor parallel_for = thread_for) const {
    std::vector<T> out(static_cast<size_t>(size.batches * size.channels * size.points));
    exact_filter(args(out.data()), parallel_for);
    return out;
  }

  // The largest error of `out`, in units of the sum over |kernel value * value|.
  double error(const std::vector<T>& out) {
    double worst = 0;
    for (int64_t b = 0; b < size.batches; ++b) {
      const int64_t image = size.feature_batches == 1 ? 0 : b;
      for (int64_t i = 0; i < size.points; ++i) {
        std::vector<double> sums(static_cast<size_t>(size.channels), 0.0);
        std::vector<double> sizes = sums;
        for (int64_t j = 0; j < size.points; ++j) {
          double square = 0;
          for (int64_t k = 0; k < size.dims; ++k) {
            square += std::pow(static_cast<double>(features.at(image, k, i)) -
                                   static_cast<double>(features.at(image, k, j)),
                               2);
          }
          const double weight = i == j && !size.self_term ? 0.0 : std::exp(-0.5 * square);
          for (int64_t c = 0; c < size.channels; ++c) {
            const double term = weight * static_cast<double>(values.at(b, c, j));
            sums[static_cast<size_t>(c)] += term;
            sizes[static_cast<size_t>(c)] += std::fabs(term);
          }
        }
        for (int64_t c = 0; c < size.channels; ++c) {
          const auto got = static_cast<double>(
              out[static_cast<size_t>((b * size.channels + c) * size.points + i)]);
          const double size_of_sum = std::max(sizes[static_cast<size_t>(c)], 1e-30);
          const double off = std::fabs(got - sums[static_cast<size_t>(c)]) / size_of_sum;
          worst = off <= worst ? worst : off;  // NaN counts as worst
        }
      }
    }
    return worst;
  }
};

template <class T>
constexpr double kTolerance = 16 * static_cast<double>(std::numeric_limits<T>::epsilon());

template <class T>
void test_against_plain_loop() {
  const Case cases[] = {
      {1, 1, 1, 1, 1, true},     {1, 1, 3, 1, 2, false},    {2, 2, 1, 2, 2, true},
      {2, 1, 3, 31, 3, false},   {1, 1, 5, 127, 4, true},   {1, 1, 6, 128, 5, false},
      {1, 1, 7, 129, 5, true},   {2, 2, 11, 64, 6, true},   {1, 1, 12, 33, 7, true},
      {1, 1, 13, 200, 1, false}, {3, 1, 9, 150, 12, true},  {1, 1, 21, 300, 5, true},
      {1, 1, 25, 16, 33, true},  {7, 1, 40, 20, 2, false},  {1, 1, 2, 700, 2, true},
      {5, 5, 2, 50, 3, false},   {1, 1, 300, 140, 3, true}, {1, 1, 4, 129, 100, false},
  };
  for (const Case& c : cases) {
    for (const Layout layout : {Layout::kContiguous, Layout::kPointsOuter, Layout::kReversed}) {
      Problem<T> problem(c, layout);
      EXPECT(problem.error(problem.filter()) <= kTolerance<T>);
    }
  }
}

template <class T>
void test_same_bits() {
  // Several blocks of keys, of tiles and of rows.
  const Problem<T> problem({2, 1, 150, 3 * kExactQueries + 5, 5, false});
  const std::string before = cpu_isa_name(current_cpu_isa());
  std::vector<T> fused;
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(cpu_isa_name(isa));
    const std::vector<T> first = problem.filter(serial_for);
    for (const ParallelFor parallel_for : {serial_for, thread_for, pool_parallel_for}) {
      EXPECT(problem.filter(parallel_for) == first);
    }
    EXPECT(Problem<T>(problem).error(first) <= kTolerance<T>);
    if (isa != CpuIsa::kBaseline) {
      EXPECT(fused.empty() || first == fused);
      fused = first;
    }
  }
  set_cpu_isa(before);
}

// Batches with one set of features give what each gives by itself.
void test_shared_features() {
  Problem<float> shared({3, 1, 4, 200, 5, true});
  const std::vector<float> all = shared.filter();
  const int64_t image = 4 * 200;
  for (int64_t b = 0; b < 3; ++b) {
    std::vector<float> out(static_cast<size_t>(image));
    ExactFilterArgs<float> args = shared.args(out.data());
    args.batches = 1;
    args.values += b * args.value_strides[0];
    exact_filter(args, serial_for);
    EXPECT(std::equal(out.begin(), out.end(), all.begin() + b * image));
  }
}

// Far from the origin: |a|^2 + |b|^2 - 2ab would be all noise here.
void test_no_cancellation() {
  Problem<float> problem({1, 1, 2, 100, 2, true});
  for (int64_t p = 0; p < 100; ++p) {
    const int64_t row = p / 10;
    problem.features.at(0, 0, p) = 20000.0F + static_cast<float>(p % 10) / 4;
    problem.features.at(0, 1, p) = -30000.0F + static_cast<float>(row) / 4;
  }
  EXPECT(problem.error(problem.filter()) <= kTolerance<float>);
}

template <class T>
void test_not_finite() {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const T inf = std::numeric_limits<T>::infinity();
  constexpr int64_t kPoints = 150;
  constexpr int64_t kBad = 140;
  const Case size = {1, 1, 2, kPoints, 2, true};
  {
    Problem<T> problem(size);
    problem.values.at(0, 1, kBad) = nan;
    const std::vector<T> out = problem.filter();
    for (size_t i = 0; i < kPoints; ++i) {
      EXPECT(std::isfinite(out[i]) && std::isnan(out[kPoints + i]));
    }
  }
  {
    Problem<T> problem(size);
    problem.features.at(0, 1, kBad) = nan;
    for (const T out : problem.filter()) {
      EXPECT(std::isnan(out));
    }
  }
  for (const bool self_term : {true, false}) {
    Problem<T> problem(size);
    problem.size.self_term = self_term;
    const std::vector<T> finite = problem.filter();
    problem.values.at(0, 0, kBad) = 0;
    const std::vector<T> without = problem.filter();
    problem.features.at(0, 0, kBad) = -inf;
    const std::vector<T> out = problem.filter();
    EXPECT(std::isfinite(finite[kBad]));
    for (size_t i = 0; i < kPoints; ++i) {
      if (i != kBad) {
        EXPECT(out[i] == without[i]);
      } else {
        EXPECT(self_term ? std::isnan(out[i]) : out[i] == 0);
      }
    }
  }
  {
    Problem<T> problem(size, Layout::kContiguous, T{1e3});  // all kernel values but K_ii underflow
    const std::vector<T> out = problem.filter();
    EXPECT(out[0] == problem.values.at(0, 0, 0));
    problem.size.self_term = false;
    EXPECT(problem.filter()[0] == 0);
  }
}

void test_sizes() {
  for (const Case& c : {Case{0, 0, 2, 5, 2, true}, Case{0, 1, 2, 5, 2, true},
                        Case{2, 2, 0, 5, 2, true}, Case{2, 1, 3, 0, 2, true}}) {
    EXPECT(Problem<float>(c).filter().empty());
  }
  const auto refused = [](const Case& c) {
    float x = 0;
    ExactFilterArgs<float> args{&x,       &x,     &x, c.batches, c.feature_batches, c.channels,
                                c.points, c.dims, {}, {},        c.self_term};
    exact_filter(args, serial_for);
  };
  EXPECT_THROWS(refused({1, 1, 1, 1, 0, true}),
                "exact_gaussian_filter: features must have 1 to 4096 dimensions, got 0");
  EXPECT_THROWS(refused({1, 1, 1, 1, int64_t{1} << 60, true}), "dimensions, got 11529215046");
  EXPECT_THROWS(refused({3, 2, 1, 1, 1, true}), "features must have 1 or 3 images, got 2");
  EXPECT_THROWS(refused({1, 1, 1, -1, 1, true}), "sizes must not be negative, got 1 x 1 x -1");
}

void test_exp_of_double(unsigned seed) {
  using portable::exp_nonpositive;
  std::mt19937_64 generator(seed);
  for (const double range : {0.4, 3.0, 708.396}) {
    std::uniform_real_distribution<double> uniform(-range, 0);
    for (int i = 0; i < 100000; ++i) {
      const double x = uniform(generator);
      const auto exact = static_cast<double>(std::exp(static_cast<long double>(x)));
      EXPECT(std::fabs(exp_nonpositive(x) - exact) <= 2 * exact * 0x1p-53);
      EXPECT(std::fabs(exp_nonpositive<true>(x) - exact) <= 2 * exact * 0x1p-53);
    }
  }
  EXPECT(exp_nonpositive(0.0) == 1.0);
  EXPECT(exp_nonpositive(-0.0) == 1.0);
  EXPECT(exp_nonpositive(-708.3964185322) >= std::numeric_limits<double>::min());
  EXPECT(exp_nonpositive(-709.0) == 0.0);
  EXPECT(exp_nonpositive(-1e300) == 0.0);
  EXPECT(exp_nonpositive(-std::numeric_limits<double>::infinity()) == 0.0);
  EXPECT(std::isnan(exp_nonpositive(std::numeric_limits<double>::quiet_NaN())));
}

}  // namespace

int main() {
  test_against_plain_loop<float>();
  test_against_plain_loop<double>();
  test_same_bits<float>();
  test_same_bits<double>();
  test_shared_features();
  test_no_cancellation();
  test_not_finite<float>();
  test_not_finite<double>();
  test_sizes();
  test_exp_of_double(3);
  return testing::report("exact_filter");
}
