// SPDX-License-Identifier: Apache-2.0
// Max pooling against a plain loop over the window, forward and backward, stages of chained
// residual pooling and gradients of weights against plain sums of products, over types, layouts,
// threads and instruction sets. Memory ends with the last number, so that AddressSanitizer sees
// what reads or writes on.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "chained_residual_pool/max_pool.h"
#include "chained_residual_pool/residual_stage.h"
#include "chained_residual_pool/weight_gradient.h"
#include "numbers.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::kDtype;
using testing::read;
using testing::thread_for;

namespace {

template <class S>
S written(double value) {
  S to;
  portable::store_as(&to, static_cast<ComputeOf<S>>(value));
  return to;
}

// The place of a number in a picture with `gap` numbers between its rows.
struct Layout {
  PoolShape shape;
  int64_t gap;

  int64_t row() const { return shape.width * (shape.channels_last ? shape.channels : 1) + gap; }
  int64_t channel() const { return shape.channels_last ? 1 : shape.height * row(); }
  int64_t batch() const {
    return shape.height * row() * (shape.channels_last ? 1 : shape.channels);
  }
  size_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<size_t>(n * batch() + c * channel() + y * row() +
                               x * (shape.channels_last ? shape.channels : 1));
  }
  size_t count() const { return static_cast<size_t>(shape.batches * batch() - gap); }
};

template <class Fn>
void for_pixels(const PoolShape& shape, const Fn& fn) {
  for (int64_t n = 0; n < shape.batches; ++n) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t y = 0; y < shape.height; ++y) {
        for (int64_t x = 0; x < shape.width; ++x) {
          fn(n, c, y, x);
        }
      }
    }
  }
}

// Whole numbers from few, so that maxima tie and sums are exact; NaN and -inf among them.
template <class S>
std::vector<S> numbers(size_t count, unsigned seed, bool special) {
  std::mt19937 random(seed);
  std::vector<S> result(count);
  for (S& to : result) {
    const unsigned draw = random() % 40;
    double value = static_cast<double>(random() % 5) - 2;
    if (special && draw == 0) {
      value = std::numeric_limits<double>::quiet_NaN();
    } else if (special && draw < 30) {
      value = -std::numeric_limits<double>::infinity();
    }
    to = written<S>(value);
  }
  return result;
}

template <class S>
void check(const PoolShape& shape, bool special) {
  const Layout own{shape, 3};
  const Layout dense{shape, 0};
  const std::vector<S> x = numbers<S>(own.count(), 1, special);
  const std::vector<S> grad = numbers<S>(own.count(), 2, false);
  const std::vector<S> addend = numbers<S>(dense.count(), 3, false);
  std::vector<S> out(dense.count());
  std::vector<S> plain(dense.count());
  std::vector<uint8_t> offsets(dense.count());
  const auto source = [&](const std::vector<S>& data) {
    return PoolSource{data.data(), own.batch(), own.channel(), own.row()};
  };
  max_pool_forward("op", kDtype<S>, {shape, source(x), out.data(), offsets.data()}, thread_for);
  max_pool_forward("op", kDtype<S>, {shape, source(x), plain.data(), nullptr}, serial_for);
  EXPECT(std::memcmp(out.data(), plain.data(), out.size() * sizeof(S)) == 0);

  std::vector<double> wanted(dense.count());
  for (size_t i = 0; i < wanted.size(); ++i) {
    wanted[i] = read(addend[i]);
  }
  const int64_t reach = shape.size / 2;
  for_pixels(shape, [&](int64_t n, int64_t c, int64_t y, int64_t x0) {
    double best = -std::numeric_limits<double>::infinity();
    int64_t best_y = y < reach ? 0 : y - reach;
    int64_t best_x = x0 < reach ? 0 : x0 - reach;
    for (int64_t i = best_y; i <= y + reach && i < shape.height; ++i) {
      for (int64_t j = x0 < reach ? 0 : x0 - reach; j <= x0 + reach && j < shape.width; ++j) {
        const double value = read(x[own.at(n, c, i, j)]);
        if (value > best || std::isnan(value)) {
          best = value;
          best_y = i;
          best_x = j;
        }
      }
    }
    const size_t at = dense.at(n, c, y, x0);
    const double got = read(out[at]);
    EXPECT(std::isnan(best) ? std::isnan(got) : got == best);
    EXPECT(offsets[at] == ((best_y - y + reach) << 4 | (best_x - x0 + reach)));
    wanted[dense.at(n, c, best_y, best_x)] += read(grad[own.at(n, c, y, x0)]);
  });
  std::vector<S> result(dense.count());
  std::vector<S> again(dense.count());
  const MaxPoolBackwardArgs args{shape, source(grad), offsets.data(), addend.data(), result.data()};
  max_pool_backward("op", kDtype<S>, args, serial_for);
  MaxPoolBackwardArgs threaded = args;
  threaded.result = again.data();
  max_pool_backward("op", kDtype<S>, threaded, thread_for);
  EXPECT(std::memcmp(result.data(), again.data(), result.size() * sizeof(S)) == 0);
  for (size_t i = 0; i < wanted.size(); ++i) {
    EXPECT(read(result[i]) == wanted[i]);
  }
}

template <class S>
void check_all() {
  for (const bool last : {false, true}) {
    for (const bool special : {false, true}) {
      for (int size = kMinPoolSize; size <= kMaxPoolSize; size += 2) {
        check<S>({2, 3, 9, 18, last, size}, special);
      }
      for (const int size : {3, 5, 7}) {
        check<S>({1, 1, 1, 1, last, size}, special);
        check<S>({1, 2, 5, 2200, last, size}, special);   // several tiles of columns
        check<S>({1, 270, 40, 9, last, size}, special);   // several groups of channels
        check<S>({1, 1, 300, 260, last, size}, special);  // several bands of rows
      }
    }
  }
}

// Whole numbers, whose sums are exact in every type.
template <class S>
void check_stage(const PoolShape& shape, bool whole) {
  const Layout own{shape, 3};
  const Layout dense{shape, 0};
  const auto channels = static_cast<size_t>(shape.channels);
  const std::vector<S> x = numbers<S>(own.count(), 1, false);
  const std::vector<S> addend = numbers<S>(own.count(), 2, false);
  const std::vector<S> weight = numbers<S>(channels * channels, 3, false);
  const std::vector<S> bias = numbers<S>(channels, 4, false);
  const auto source = [&](const std::vector<S>& data) {
    return PoolSource{data.data(), own.batch(), own.channel(), own.row()};
  };
  const std::vector<PoolSource> addends = {source(addend), source(x)};
  std::vector<S> out(dense.count());
  std::vector<S> pooled(dense.count());
  std::vector<uint8_t> offsets(dense.count());
  residual_stage("op", kDtype<S>,
                 {shape, source(x), weight.data(), whole ? bias.data() : nullptr, addends.data(),
                  whole ? 2 : 0, out.data(), whole ? pooled.data() : nullptr,
                  whole ? offsets.data() : nullptr},
                 thread_for);
  std::vector<S> wanted_pooled(dense.count());
  std::vector<uint8_t> wanted_offsets(dense.count());
  if (shape.size > 1) {
    max_pool_forward("op", kDtype<S>,
                     {shape, source(x), wanted_pooled.data(), wanted_offsets.data()}, serial_for);
  } else {
    for_pixels(shape, [&](int64_t n, int64_t c, int64_t y, int64_t x0) {
      wanted_pooled[dense.at(n, c, y, x0)] = x[own.at(n, c, y, x0)];
    });
  }
  if (whole) {
    EXPECT(std::memcmp(pooled.data(), wanted_pooled.data(), pooled.size() * sizeof(S)) == 0);
    EXPECT(offsets == wanted_offsets);
  }
  for_pixels(shape, [&](int64_t n, int64_t c, int64_t y, int64_t x0) {
    double sum = whole ? read(bias[static_cast<size_t>(c)]) + read(addend[own.at(n, c, y, x0)]) +
                             read(x[own.at(n, c, y, x0)])
                       : 0;
    for (int64_t k = 0; k < shape.channels; ++k) {
      sum += read(weight[static_cast<size_t>(c) * channels + static_cast<size_t>(k)]) *
             read(wanted_pooled[dense.at(n, k, y, x0)]);
    }
    EXPECT(read(out[dense.at(n, c, y, x0)]) == sum);
  });
  std::vector<S> transposed(weight.size());
  for (size_t o = 0; o < channels; ++o) {
    for (size_t i = 0; i < channels; ++i) {
      transposed[i * channels + o] = weight[o * channels + i];
    }
  }
  std::vector<S> again(dense.count());
  residual_stage("op", kDtype<S>,
                 {shape, source(x), transposed.data(), whole ? bias.data() : nullptr,
                  addends.data(), whole ? 2 : 0, again.data(), nullptr, nullptr, true},
                 serial_for);
  EXPECT(std::memcmp(out.data(), again.data(), out.size() * sizeof(S)) == 0);
  if (whole) {
    residual_sum(kDtype<S>, {shape, addends.data(), 2, out.data()}, thread_for);
    for_pixels(shape, [&](int64_t n, int64_t c, int64_t y, int64_t x0) {
      EXPECT(read(out[dense.at(n, c, y, x0)]) ==
             read(addend[own.at(n, c, y, x0)]) + read(x[own.at(n, c, y, x0)]));
    });
  }
}

// Products may take subnormal numbers for 0, pools and residuals do not.
template <class S>
void check_subnormal(double value) {
  for (const bool last : {false, true}) {
    for (const int size : {1, 3}) {
      const PoolShape shape{1, 5, 3, 41, last, size};
      const Layout dense{shape, 0};
      const std::vector<S> x(dense.count(), written<S>(value));
      EXPECT(read(x[0]) == value);
      const std::vector<S> weight(25);
      const PoolSource source{x.data(), dense.batch(), dense.channel(), dense.row()};
      std::vector<S> out(dense.count());
      std::vector<S> pooled(dense.count());
      residual_stage(
          "op", kDtype<S>,
          {shape, source, weight.data(), nullptr, &source, 1, out.data(), pooled.data(), nullptr},
          serial_for);
      EXPECT(std::memcmp(out.data(), x.data(), x.size() * sizeof(S)) == 0);
      EXPECT(std::memcmp(pooled.data(), x.data(), x.size() * sizeof(S)) == 0);
    }
  }
}

template <class S>
void check_stages() {
  for (const bool last : {false, true}) {
    for (const int size : {1, 3, 5, 9}) {
      check_stage<S>({2, 3, 9, 18, last, size}, true);
      check_stage<S>({1, 30, 11, 13, last, size}, false);
    }
    check_stage<S>({1, 1, 1, 1, last, 5}, true);
    check_stage<S>({1, 13, 3, 1, last, 3}, true);
    // Several tiles across, down; several groups of channels.
    check_stage<S>({1, 18, 40, 270, last, 5}, true);
    check_stage<S>({1, 70, 88, 17, last, 5}, true);
    check_stage<S>({1, 130, 6, 7, last, 5}, true);
  }
}

// Large pooled maps go past the caches, where whole lines are written: rows of 270 are not.
template <class S>
void check_streamed(int64_t width, bool last) {
  const PoolShape shape{1, 18, 452, width, last, 3};
  const Layout dense{shape, 0};
  EXPECT(static_cast<int64_t>(dense.count() * sizeof(S)) >= kStreamedBytes);
  struct alignas(64) Line {
    char bytes[64];
  };
  const std::vector<S> x = numbers<S>(dense.count(), 5, false);
  const std::vector<S> weight = numbers<S>(18 * 18, 6, false);
  const PoolSource source{x.data(), dense.batch(), dense.channel(), dense.row()};
  std::vector<S> out(dense.count());
  std::vector<Line> lines(dense.count() * sizeof(S) / sizeof(Line) + 1);
  S* const pooled = reinterpret_cast<S*>(lines.data());
  std::vector<S> wanted(dense.count());
  residual_stage(
      "op", kDtype<S>,
      {shape, source, weight.data(), nullptr, &source, 1, out.data(), pooled, nullptr, false, true},
      thread_for);
  max_pool_forward("op", kDtype<S>, {shape, source, wanted.data(), nullptr}, serial_for);
  EXPECT(std::memcmp(pooled, wanted.data(), wanted.size() * sizeof(S)) == 0);
}

// Whole numbers again; a bias' or a weight's gradient alone has the same bits.
template <class S>
void check_weight_gradient(const PoolShape& shape, int64_t gap) {
  const Layout own{shape, gap};
  const auto channels = static_cast<size_t>(shape.channels);
  const std::vector<S> grad = numbers<S>(own.count(), 1, false);
  const std::vector<S> input = numbers<S>(own.count(), 2, false);
  const auto source = [&](const std::vector<S>& data) {
    return PoolSource{data.data(), own.batch(), own.channel(), own.row()};
  };
  std::vector<S> weight(channels * channels);
  std::vector<S> bias(channels);
  const WeightGradientArgs args{shape, source(grad), source(input), weight.data(), bias.data()};
  weight_gradient(kDtype<S>, args, thread_for);
  std::vector<double> wanted(channels * channels);
  std::vector<double> wanted_bias(channels);
  for_pixels(shape, [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    const double g = read(grad[own.at(n, c, y, x)]);
    wanted_bias[static_cast<size_t>(c)] += g;
    for (int64_t k = 0; k < shape.channels; ++k) {
      wanted[static_cast<size_t>(c) * channels + static_cast<size_t>(k)] +=
          g * read(input[own.at(n, k, y, x)]);
    }
  });
  for (size_t i = 0; i < weight.size(); ++i) {
    EXPECT(read(weight[i]) == read(written<S>(wanted[i])));
  }
  for (size_t i = 0; i < channels; ++i) {
    EXPECT(read(bias[i]) == read(written<S>(wanted_bias[i])));
  }
  std::vector<S> weight_alone(weight.size());
  std::vector<S> bias_alone(bias.size());
  weight_gradient(kDtype<S>, {shape, source(grad), source(input), weight_alone.data(), nullptr},
                  serial_for);
  weight_gradient(kDtype<S>, {shape, source(grad), {}, nullptr, bias_alone.data()}, serial_for);
  EXPECT(std::memcmp(weight.data(), weight_alone.data(), weight.size() * sizeof(S)) == 0);
  EXPECT(std::memcmp(bias.data(), bias_alone.data(), bias.size() * sizeof(S)) == 0);
}

template <class S>
void check_weight_gradients() {
  for (const bool last : {false, true}) {
    check_weight_gradient<S>({1, 1, 1, 1, last, 1}, 0);
    check_weight_gradient<S>({2, 3, 9, 18, last, 1}, 3);
    check_weight_gradient<S>({3, 30, 7, 5, last, 1}, 0);
    check_weight_gradient<S>({2, 37, 40, 33, last, 1}, 1);  // several slabs, an odd width
    check_weight_gradient<S>({1, 5, 2, 9000, last, 1}, 0);  // several blocks of a row
    check_weight_gradient<S>({1, 280, 5, 20, last, 1}, 0);  // several groups of outputs
    check_weight_gradient<S>({0, 3, 9, 18, last, 1}, 0);    // sums of nothing
  }
}

void check_refusals() {
  const float x = 0;
  float out = 0;
  const auto run = [&](const PoolShape& shape) {
    max_pool_forward("op", FloatType::kFloat32, {shape, {&x, 1, 1, 1}, &out, nullptr}, serial_for);
  };
  EXPECT_THROWS(run({1, 1, 1, 1, false, 4}), "op: kernel_size must be odd and in [3, 13], got 4");
  EXPECT_THROWS(run({1, 1, 1, 1, false, 15}), "got 15");
  EXPECT_THROWS(run({1, 1, 0, 1, false, 3}), "op: x must have at least one pixel, got size (0, 1)");
  EXPECT_THROWS(run({-1, 1, 1, 1, false, 3}), "batch and channels must not be negative");
  run({0, 1, 1, 1, false, 3});
}

}  // namespace

int main() {
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(cpu_isa_name(isa));
    check_all<float>();
    check_all<double>();
    check_all<BFloat16>();
    check_all<Half>();
    check_stages<float>();
    check_stages<double>();
    check_stages<BFloat16>();
    check_stages<Half>();
    for (const bool last : {false, true}) {
      for (const int64_t width : {270, 288}) {
        check_streamed<float>(width, last);
        check_streamed<BFloat16>(width, last);
      }
    }
    check_subnormal<float>(0x1.2p-130);
    check_subnormal<BFloat16>(0x1.4p-130);
    check_subnormal<Half>(0x1.4p-20);
    check_weight_gradients<float>();
    check_weight_gradients<double>();
    check_weight_gradients<BFloat16>();
    check_weight_gradients<Half>();
  }
  check_refusals();
  return testing::report("chained_residual_pool");
}
