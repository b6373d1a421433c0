// SPDX-License-Identifier: Apache-2.0
// Upsampling against a plain loop over the taps' definition, forward and backward, and against
// itself over threads, instruction sets and memory layouts.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "axis_weights.h"
#include "common/half.h"
#include "common/thread_pool.h"
#include "numbers.h"
#include "testing.h"
#include "upsample/upsample.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::kDtype;
using testing::read;
using testing::thread_for;
using testing::weight_of;

namespace {

// How far off a result may be.
template <class S>
constexpr double kTolerance = std::is_same_v<S, double>     ? 1e-12
                              : std::is_same_v<S, float>    ? 2e-5
                              : std::is_same_v<S, BFloat16> ? 8e-3
                                                            : 1e-3;

// A picture with `gap` numbers of NaN between its rows; the memory ends with the last number, so
// that AddressSanitizer sees what reads or writes on.
template <class S>
struct Array {
  int64_t channels;
  int64_t height;
  int64_t width;
  PictureStrides strides;
  bool last;
  std::vector<S> memory;

  Array(int64_t batches, int64_t num_channels, int64_t rows, int64_t columns, bool channels_last,
        int64_t gap)
      : channels(num_channels), height(rows), width(columns), last(channels_last) {
    const int64_t row = width * (last ? channels : 1) + gap;
    strides = last ? PictureStrides{height * row, 1, row}
                   : PictureStrides{channels * height * row, height * row, row};
    S nan;
    portable::store_as(&nan, std::numeric_limits<ComputeOf<S>>::quiet_NaN());
    memory.assign(static_cast<size_t>(batches * strides.batch - gap), nan);
  }
  S& at(int64_t n, int64_t c, int64_t y, int64_t x) {
    const int64_t pixel = last ? x * channels : x;
    return memory[static_cast<size_t>(n * strides.batch + c * strides.channel + y * strides.row +
                                      pixel)];
  }
  void fill(int64_t batches, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<ComputeOf<S>> uniform(-1, 1);
    for (int64_t n = 0; n < batches; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t y = 0; y < height; ++y) {
          for (int64_t x = 0; x < width; ++x) {
            portable::store_as(&at(n, c, y, x), uniform(generator));
          }
        }
      }
    }
  }
};

struct Axes {
  AxisSpec y;
  AxisSpec x;
};

Axes bilinear(int64_t h, int64_t w, int64_t height, int64_t width, bool corners = false) {
  const AxisGrid grid = corners ? AxisGrid::kAlignCorners : AxisGrid::kHalfPixel;
  return {{grid, AxisBorder::kClamp, h, height, 0, 1, 0},
          {grid, AxisBorder::kClamp, w, width, 0, 1, 0}};
}
Axes crop(int64_t h, int64_t w, int64_t height, int64_t width, int64_t stride, double offset,
          AxisBorder border = AxisBorder::kZeros) {
  return {{AxisGrid::kCrop, border, h, height, 0, stride, offset},
          {AxisGrid::kCrop, border, w, width, 0, stride + 1, offset / 2}};
}
Axes nearest(int64_t h, int64_t w, int64_t height, int64_t width) {
  return {{AxisGrid::kNearest, AxisBorder::kClamp, h, height, 0, 1, 0},
          {AxisGrid::kNearest, AxisBorder::kClamp, w, width, 0, 1, 0}};
}

struct Case {
  int64_t batches;
  int64_t channels;
  int64_t height;
  int64_t width;
  std::vector<Axes> inputs;
  int same = 0;  // inputs of the output's size beside these
  bool relu = false;
};

// The matrix of an axis, [out, in].
std::vector<double> matrix_of(const AxisSpec& axis) {
  std::vector<double> matrix;
  for (int64_t y = 0; y < axis.out_size; ++y) {
    for (int64_t i = 0; i < axis.in_size; ++i) {
      matrix.push_back(weight_of(axis, y, i));
    }
  }
  return matrix;
}

template <class S>
struct Problem {
  Case size;
  bool last;
  std::vector<Array<S>> maps;
  std::vector<UpsampleInput> inputs;

  Problem(const Case& c, bool channels_last, int64_t gap) : size(c), last(channels_last) {
    for (int k = 0; k < c.same + static_cast<int>(c.inputs.size()); ++k) {
      const bool same = k < c.same;
      const Axes axes = same ? Axes{} : c.inputs[static_cast<size_t>(k - c.same)];
      maps.emplace_back(c.batches, c.channels, same ? c.height : axes.y.in_size,
                        same ? c.width : axes.x.in_size, last, gap);
      maps.back().fill(c.batches, static_cast<unsigned>(k));
      inputs.push_back({nullptr, maps.back().strides, axes.y, axes.x, same});
    }
    for (size_t k = 0; k < maps.size(); ++k) {
      inputs[k].data = maps[k].memory.data();
    }
  }

  UpsampleShape shape() const {
    return {size.batches, size.channels, size.height, size.width, last};
  }
  Array<S> output(int64_t gap = 0) const {
    return Array<S>(size.batches, size.channels, size.height, size.width, last, gap);
  }
  Array<S> forward(ParallelFor parallel_for) {
    Array<S> out = output();
    upsample_forward(
        "test", kDtype<S>,
        {shape(), inputs.data(), static_cast<int>(inputs.size()), out.memory.data(), size.relu},
        parallel_for);
    return out;
  }
  // Gradients of the maps, those of the output's size shared: the first one.
  std::vector<Array<S>> backward(const Array<S>& grad, const Array<S>* out,
                                 ParallelFor parallel_for) const {
    std::vector<Array<S>> results;
    std::vector<UpsampleInput> to;
    for (size_t k = 0; k < inputs.size(); ++k) {
      if (inputs[k].same_size && k > 0) {
        continue;
      }
      results.emplace_back(size.batches, size.channels, maps[k].height, maps[k].width, last, 0);
      to.push_back(inputs[k]);
      to.back().strides = results.back().strides;
    }
    for (size_t k = 0; k < to.size(); ++k) {
      to[k].data = results[k].memory.data();
    }
    upsample_backward(
        "test", kDtype<S>,
        {shape(), grad.memory.data(), grad.strides, out == nullptr ? nullptr : out->memory.data(),
         to.data(), static_cast<int>(to.size())},
        parallel_for);
    return results;
  }

  void check_forward(Array<S>& out) {
    std::vector<std::vector<double>> rows;
    std::vector<std::vector<double>> columns;
    for (const UpsampleInput& input : inputs) {
      rows.push_back(input.same_size ? std::vector<double>() : matrix_of(input.y));
      columns.push_back(input.same_size ? std::vector<double>() : matrix_of(input.x));
    }
    each_output([&](int64_t n, int64_t c, int64_t y, int64_t x) {
      double sum = 0;
      for (size_t k = 0; k < maps.size(); ++k) {
        if (inputs[k].same_size) {
          sum += read(maps[k].at(n, c, y, x));
          continue;
        }
        for (int64_t i = 0; i < maps[k].height; ++i) {
          const double wy = rows[k][static_cast<size_t>(y * maps[k].height + i)];
          for (int64_t j = 0; wy > 0 && j < maps[k].width; ++j) {
            const double wx = columns[k][static_cast<size_t>(x * maps[k].width + j)];
            sum += wx > 0 ? wy * wx * read(maps[k].at(n, c, i, j)) : 0;
          }
        }
      }
      sum = size.relu && sum < 0 ? 0 : sum;
      EXPECT(std::fabs(read(out.at(n, c, y, x)) - sum) <= tolerance());
    });
  }

  void check_backward(Array<S>& grad, Array<S>* out, std::vector<Array<S>>& results) {
    size_t result = 0;
    for (size_t k = 0; k < maps.size(); ++k) {
      if (inputs[k].same_size && k > 0) {
        continue;
      }
      const Array<S>& map = maps[k];
      std::vector<double> sums(map.memory.size(), 0.0);
      std::vector<double> sizes = sums;
      const bool same = inputs[k].same_size;
      const std::vector<double> rows = same ? std::vector<double>() : matrix_of(inputs[k].y);
      const std::vector<double> columns = same ? std::vector<double>() : matrix_of(inputs[k].x);
      const auto index = [&](int64_t n, int64_t c, int64_t i, int64_t j) {
        return static_cast<size_t>(((n * map.channels + c) * map.height + i) * map.width + j);
      };
      each_output([&](int64_t n, int64_t c, int64_t y, int64_t x) {
        const bool masked = out != nullptr && !(read(out->at(n, c, y, x)) > 0);
        const double value = masked ? 0 : read(grad.at(n, c, y, x));
        for (int64_t i = same ? y : 0; i < (same ? y + 1 : map.height); ++i) {
          const double wy = same ? 1 : rows[static_cast<size_t>(y * map.height + i)];
          for (int64_t j = same ? x : 0; wy > 0 && j < (same ? x + 1 : map.width); ++j) {
            const double wx = same ? 1 : columns[static_cast<size_t>(x * map.width + j)];
            sums[index(n, c, i, j)] += wy * wx * value;
            sizes[index(n, c, i, j)] += wy * wx * std::fabs(value);
          }
        }
      });
      Array<S>& got = results[result++];
      for (int64_t n = 0; n < size.batches; ++n) {
        for (int64_t c = 0; c < map.channels; ++c) {
          for (int64_t i = 0; i < map.height; ++i) {
            for (int64_t j = 0; j < map.width; ++j) {
              const size_t at = index(n, c, i, j);
              EXPECT(std::fabs(read(got.at(n, c, i, j)) - sums[at]) <=
                     tolerance() * (1 + sizes[at]));
            }
          }
        }
      }
    }
  }

  // A coordinate of size n is off by n roundings of 1, a sum by one for each map.
  double tolerance() const {
    double most = 0;
    for (const Array<S>& map : maps) {
      most = std::max(most, static_cast<double>(std::max(map.height, map.width)));
    }
    return kTolerance<S> * (static_cast<double>(maps.size()) + 1 + most / 100);
  }

  template <class Fn>
  void each_output(const Fn& fn) const {
    for (int64_t n = 0; n < size.batches; ++n) {
      for (int64_t c = 0; c < size.channels; ++c) {
        for (int64_t y = 0; y < size.height; ++y) {
          for (int64_t x = 0; x < size.width; ++x) {
            fn(n, c, y, x);
          }
        }
      }
    }
  }
};

std::vector<Case> cases() {
  return {
      {2, 3, 20, 31, {bilinear(7, 9, 20, 31)}},
      {1, 17, 9, 40, {bilinear(4, 5, 9, 40, true)}},
      {1, 5, 7, 6, {bilinear(13, 20, 7, 6)}},
      {2, 1, 1, 1, {bilinear(3, 2, 1, 1, true)}},
      {1, 33, 5, 17, {bilinear(5, 3, 5, 17)}},
      {1, 2, 3, 2100, {bilinear(2, 900, 3, 2100)}},
      {1, 3, 7, 40, {bilinear(5, 60, 7, 40)}},
      {1, 20, 7, 41, {bilinear(9, 120, 7, 41, true)}},
      {1, 2, 3, 20, {bilinear(4, 200, 3, 20)}},
      {2, 21, 24, 20, {crop(3, 4, 24, 20, 8, 3.5)}},
      {1, 4, 30, 33, {crop(3, 2, 30, 33, 4, -7.25)}},
      {1, 6, 12, 10, {crop(4, 4, 12, 10, 3, 5, AxisBorder::kClamp)}},
      {1, 3, 40, 8, {crop(1, 1, 40, 8, 16, -11.5)}},
      {1, 18, 16, 12, {bilinear(8, 6, 16, 12), bilinear(4, 3, 16, 12)}, 1, true},
      {2, 2, 9, 35, {bilinear(3, 4, 9, 35, true), bilinear(9, 7, 9, 35, true)}, 2, false},
      {1, 40, 6, 8, {nearest(3, 4, 6, 8), nearest(2, 8, 6, 8)}, 0, true},
      {1, 7, 11, 5, {nearest(4, 9, 11, 5)}, 1, false},
  };
}

template <class S>
void test_against_plain_loop() {
  for (const Case& c : cases()) {
    for (const bool last : {false, true}) {
      for (const int64_t gap : {0, 3}) {
        Problem<S> problem(c, last, gap);
        Array<S> out = problem.forward(thread_for);
        problem.check_forward(out);
        Array<S> grad = problem.output(gap);
        grad.fill(c.batches, 99);
        Array<S>* const mask = c.relu ? &out : nullptr;
        std::vector<Array<S>> results = problem.backward(grad, mask, thread_for);
        problem.check_backward(grad, mask, results);
      }
    }
  }
}

template <class S>
bool same_memory(const Array<S>& a, const Array<S>& b) {
  return std::memcmp(a.memory.data(), b.memory.data(), a.memory.size() * sizeof(S)) == 0;
}

// Several tasks in both directions: many planes, several bands of rows, several tiles of columns.
template <class S>
void test_same_bits() {
  const Case several[] = {
      {2, 21, 140, 131, {bilinear(35, 20, 140, 131)}},
      {1, 1, 600, 640, {crop(80, 70, 600, 640, 8, 31)}},
      {1, 70, 64, 48, {bilinear(32, 24, 64, 48), bilinear(8, 6, 64, 48)}, 1, true},
  };
  const std::string before = cpu_isa_name(current_cpu_isa());
  for (const Case& c : several) {
    for (const bool last : {false, true}) {
      Problem<S> problem(c, last, 0);
      Array<S> grad = problem.output();
      grad.fill(c.batches, 7);
      std::vector<std::vector<Array<S>>> fused;
      for (const CpuIsa isa : available_cpu_isas()) {
        set_cpu_isa(cpu_isa_name(isa));
        std::vector<Array<S>> first;
        for (const ParallelFor parallel_for : {serial_for, thread_for, pool_parallel_for}) {
          Array<S> out = problem.forward(parallel_for);
          std::vector<Array<S>> results =
              problem.backward(grad, c.relu ? &out : nullptr, parallel_for);
          results.push_back(std::move(out));
          if (first.empty()) {
            first = std::move(results);
            continue;
          }
          for (size_t k = 0; k < first.size(); ++k) {
            EXPECT(same_memory(results[k], first[k]));
          }
        }
        if (isa != CpuIsa::kBaseline) {
          fused.push_back(std::move(first));
        }
      }
      for (size_t i = 1; i < fused.size(); ++i) {
        for (size_t k = 0; k < fused[0].size(); ++k) {
          EXPECT(same_memory(fused[i][k], fused[0][k]));
        }
      }
    }
  }
  set_cpu_isa(before);
}

void test_sizes() {
  const auto run = [](const UpsampleShape& shape, const Axes& axes, int count = 1) {
    float x = 0;
    float out = 0;
    const UpsampleInput input = {&x, {1, 1, 1}, axes.y, axes.x, false};
    upsample_forward("op", FloatType::kFloat32, {shape, &input, count, &out, false}, serial_for);
  };
  run({0, 3, 2, 2, false}, bilinear(1, 1, 2, 2));
  run({3, 0, 2, 2, true}, bilinear(1, 1, 2, 2));
  const UpsampleShape shape = {1, 1, 1, 1, false};
  EXPECT_THROWS(run({1, 1, 0, 1, false}, bilinear(1, 1, 1, 1)),
                "op: size must be in [1, 2147483583], got (0, 1)");
  EXPECT_THROWS(run({1, -1, 1, 1, false}, bilinear(1, 1, 1, 1)), "must not be negative, got 1 and");
  EXPECT_THROWS(run(shape, bilinear(0, 1, 1, 1)), "op: height of the input must be in [1, ");
  EXPECT_THROWS(run(shape, bilinear(1, 1, 1, 2)), "op: width must be 1, got 2");
  EXPECT_THROWS(run(shape, crop(1, 1, 1, 1, 0, 0)), "op: stride must be in [1, ");
  EXPECT_THROWS(run(shape, crop(1, 1, 1, 1, 1, 1e13)),
                "op: offset must be within 1e+12, got 1e+13");
  EXPECT_THROWS(run(shape, crop(1, 1, 1, 1, 1, std::nan(""))), "op: offset must be within");
  EXPECT_THROWS(run(shape, bilinear(1, 1, 1, 1), 17), "op: inputs must be 1 to 16, got 17");
}

}  // namespace

int main() {
  test_against_plain_loop<float>();
  test_against_plain_loop<double>();
  test_against_plain_loop<BFloat16>();
  test_against_plain_loop<Half>();
  test_same_bits<float>();
  test_same_bits<double>();
  test_same_bits<BFloat16>();
  test_sizes();
  return testing::report("upsample");
}
