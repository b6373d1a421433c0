// SPDX-License-Identifier: Apache-2.0
// Maps of taps and depthwise convolutions against plain sums, over types, layouts, threads and
// instruction sets. Memory ends with the last number, so that AddressSanitizer sees what reads or
// writes on.
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "atrous_conv/depthwise.h"
#include "atrous_conv/tap_maps.h"
#include "numbers.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::kDtype;
using testing::on_every_isa;
using testing::read;
using testing::same_bytes;
using testing::thread_for;
using testing::whole_numbers;

namespace {

struct Case {
  int64_t outputs;
  int64_t height;
  int64_t width;
  std::vector<int64_t> rows;
  std::vector<int64_t> columns;
};

constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
constexpr int64_t kBack = std::numeric_limits<int64_t>::min();

std::vector<Case> cases() {
  return {
      {3, 7, 9, {0, -2, 2, 5}, {0, 2, -2, -8}},
      {21, 5, 33, {0, 1, -4}, {0, -17, 32}},
      {2, 3, 1100, {0, 2, -1}, {0, 600, -1099}},
      {17, 1, 1, {0, 1}, {0, 0}},
      {1, 2, 3, {0, kFar, kBack, 0, 0}, {0, 0, 0, kFar, kBack}},
      {2, 40, 600, {-39}, {3}},
      {2, 4, 5, {}, {}},
  };
}

bool in(int64_t i, int64_t shift, int64_t size) {
  return shift < size && shift > -size && i + shift >= 0 && i + shift < size;
}

template <class S, class M>
void check(const Case& c, bool channels_last) {
  const auto taps = static_cast<int64_t>(c.rows.size());
  const int64_t plane = c.height * c.width;
  const TapMaps shape = {
      c.outputs, c.height, c.width, taps, c.rows.data(), c.columns.data(), !std::is_same_v<S, M>};
  const std::vector<M> maps = whole_numbers<M>(taps * c.outputs * plane, 1, 9);
  const auto bias = whole_numbers<ComputeOf<S>>(c.outputs, 2, 9);
  std::vector<S> out(static_cast<size_t>(c.outputs * plane));
  const auto at = [&](int64_t o, int64_t y, int64_t x) {
    return static_cast<size_t>(channels_last ? (y * c.width + x) * c.outputs + o
                                             : o * plane + y * c.width + x);
  };
  TapSumArgs args = {shape, maps.data(), bias.data(), {out.data(), plane, c.width, 1}};
  if (channels_last) {
    args.out = {out.data(), 1, c.width * c.outputs, c.outputs};
  }
  tap_sum("op", kDtype<S>, args, serial_for);
  for (int64_t o = 0; o < c.outputs; ++o) {
    for (int64_t y = 0; y < c.height; ++y) {
      for (int64_t x = 0; x < c.width; ++x) {
        auto sum = static_cast<double>(bias[static_cast<size_t>(o)]);
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t dy = c.rows[static_cast<size_t>(t)];
          const int64_t dx = c.columns[static_cast<size_t>(t)];
          if (in(y, dy, c.height) && in(x, dx, c.width)) {
            sum += read(maps[static_cast<size_t>((t * c.outputs + o) * plane + (y + dy) * c.width +
                                                 x + dx)]);
          }
        }
        EXPECT(read(out[at(o, y, x)]) == sum);
      }
    }
  }
  const std::vector<S> first = out;
  out.assign(out.size(), S{});
  tap_sum("op", kDtype<S>, args, thread_for);
  EXPECT(same_bytes(out, first));
  args.bias = nullptr;
  tap_sum("op", kDtype<S>, args, serial_for);
  EXPECT(read(out[0]) == read(first[0]) - static_cast<double>(bias[0]));

  // Rows from the second on, of maps that hold something else before.
  const std::vector<S> grad = whole_numbers<S>(c.outputs * plane, 3, 9);
  for (const int64_t top : {int64_t{0}, c.height / 2}) {
    const int64_t count = c.height - top;
    std::vector<M> shifted = whole_numbers<M>(taps * c.outputs * count * c.width, 4, 9);
    TapSpreadArgs spread = {shape, grad.data(), top, count, shifted.data()};
    tap_spread("op", kDtype<S>, spread, serial_for);
    for (int64_t i = 0; i < static_cast<int64_t>(shifted.size()); ++i) {
      const int64_t x = i % c.width;
      const int64_t y = i / c.width % count + top;
      const int64_t o = i / (c.width * count) % c.outputs;
      const auto t = static_cast<size_t>(i / (c.width * count * c.outputs));
      const int64_t dy = c.rows[t] == kBack ? kFar : -c.rows[t];
      const int64_t dx = c.columns[t] == kBack ? kFar : -c.columns[t];
      const double expected =
          in(y, dy, c.height) && in(x, dx, c.width)
              ? read(grad[static_cast<size_t>(o * plane + (y + dy) * c.width + x + dx)])
              : 0;
      EXPECT(read(shifted[static_cast<size_t>(i)]) == expected);
    }
    const std::vector<M> serial = shifted;
    shifted = whole_numbers<M>(static_cast<int64_t>(shifted.size()), 5, 9);
    spread.maps = shifted.data();
    tap_spread("op", kDtype<S>, spread, thread_for);
    EXPECT(same_bytes(shifted, serial));
  }
}

template <class S>
void check_all() {
  for (const Case& c : cases()) {
    for (const bool channels_last : {false, true}) {
      check<S, S>(c, channels_last);
      check<S, ComputeOf<S>>(c, channels_last);
    }
  }
}

// From the bias on, in float, rounded once.
void check_order() {
  const int64_t zeros[3] = {0, 0, 0};
  std::vector<BFloat16> maps(3);
  const float bias = -1.0F;
  portable::store_as(maps.data(), 0x1p-9F);
  portable::store_as(maps.data() + 1, 0x1p-9F);
  portable::store_as(maps.data() + 2, 1.0F);
  BFloat16 out;
  tap_sum("op", FloatType::kBFloat16,
          {{1, 1, 1, 3, zeros, zeros, false}, maps.data(), &bias, {&out, 1, 1, 1}}, serial_for);
  EXPECT(read(out) == 0x1p-8);
}

// Sizes of x and its kernel, rates, padding; outputs as many as the padding leaves.
std::vector<DepthwiseShape> depthwise_shapes() {
  const auto shape = [](int64_t n, int64_t c, int64_t h, int64_t w, int64_t kh, int64_t kw,
                        int64_t dy, int64_t dx, int64_t top, int64_t left, int64_t more) {
    return DepthwiseShape{n,
                          c,
                          h,
                          w,
                          h + 2 * top - (kh - 1) * dy + more,
                          w + 2 * left - (kw - 1) * dx,
                          kh,
                          kw,
                          dy,
                          dx,
                          top,
                          left,
                          false};
  };
  return {shape(2, 3, 7, 9, 3, 3, 2, 2, 2, 2, 0),      shape(1, 37, 6, 33, 3, 3, 5, 18, 5, 18, 0),
          shape(1, 2, 3, 4, 3, 3, 40, 50, 40, 50, 0),  shape(3, 17, 1, 1, 3, 3, 1, 1, 1, 1, 0),
          shape(1, 1, 300, 1000, 2, 3, 3, 7, 9, 3, 2), shape(2, 16, 8, 20, 1, 5, 1, 2, -1, -3, 0),
          shape(1, 5, 4, 3, 4, 1, 2, 1, 8, 0, 0)};
}

// x and the sum's own numbers are small and whole: all sums are exact.
template <class S>
void check_depthwise(DepthwiseShape shape, bool channels_last) {
  shape.channels_last = channels_last;
  const int64_t c_count = shape.channels;
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  const auto source = [&](const std::vector<S>& from, int64_t h, int64_t w) {
    return DepthwiseSource{from.data(), c_count * h * w, channels_last ? 1 : h * w,
                           channels_last ? w * c_count : w};
  };
  const auto at = [&](int64_t n, int64_t c, int64_t y, int64_t x, int64_t h, int64_t w) {
    return static_cast<size_t>(channels_last ? ((n * h + y) * w + x) * c_count + c
                                             : ((n * c_count + c) * h + y) * w + x);
  };
  const std::vector<S> x =
      whole_numbers<S>(shape.batches * c_count * shape.height * shape.width, 1, 9);
  const std::vector<S> weight = whole_numbers<S>(c_count * taps, 2, 9);
  const std::vector<S> bias = whole_numbers<S>(c_count, 3, 9);
  const int64_t outputs = shape.batches * c_count * shape.out_height * shape.out_width;
  std::vector<S> grad(static_cast<size_t>(outputs));
  for (size_t i = 0; i < grad.size(); i += grad.size() / 50 + 1) {  // few, so that sums fit
    portable::store_as(&grad[i], static_cast<ComputeOf<S>>(static_cast<int>(i % 3) - 1));
  }
  // Calls fn(output, input, tap) wherever a tap reads the picture.
  const auto for_reads = [&](const auto& fn) {
    for (int64_t n = 0; n < shape.batches; ++n) {
      for (int64_t c = 0; c < c_count; ++c) {
        for (int64_t y = 0; y < shape.out_height; ++y) {
          for (int64_t p = 0; p < shape.out_width; ++p) {
            for (int64_t k = 0; k < taps; ++k) {
              const int64_t from = y + k / shape.kernel_width * shape.dilation_y - shape.top;
              const int64_t column = p + k % shape.kernel_width * shape.dilation_x - shape.left;
              if (from >= 0 && from < shape.height && column >= 0 && column < shape.width) {
                fn(at(n, c, y, p, shape.out_height, shape.out_width),
                   at(n, c, from, column, shape.height, shape.width),
                   static_cast<size_t>(c * taps + k));
              }
            }
          }
        }
      }
    }
  };
  for (const bool flipped : {false, true}) {
    std::vector<double> sums(static_cast<size_t>(outputs));
    for_reads([&](size_t to, size_t from, size_t tap) {
      const auto count = static_cast<size_t>(taps);
      const size_t own = flipped ? tap / count * count + count - 1 - tap % count : tap;
      sums[to] += read(x[from]) * read(weight[own]);
    });
    for (const bool relu : {false, true}) {
      std::vector<S> out(static_cast<size_t>(outputs));
      const DepthwiseArgs args = {shape,         source(x, shape.height, shape.width),
                                  weight.data(), bias.data(),
                                  out.data(),    flipped,
                                  relu};
      depthwise("op", kDtype<S>, args, serial_for);
      for (size_t i = 0; i < out.size(); ++i) {
        const auto index = static_cast<int64_t>(i);
        const int64_t c = channels_last ? index % c_count
                                        : index / (shape.out_height * shape.out_width) % c_count;
        const double sum = sums[i] + read(bias[static_cast<size_t>(c)]);
        S rounded;
        portable::store_as(&rounded, static_cast<ComputeOf<S>>(relu && sum < 0 ? 0 : sum));
        EXPECT(read(out[i]) == read(rounded));
      }
      const std::vector<S> first = out;
      out.assign(out.size(), S{});
      depthwise("op", kDtype<S>, args, thread_for);
      EXPECT(same_bytes(out, first));
    }
  }
  std::vector<double> sums(static_cast<size_t>(c_count * taps));
  for_reads(
      [&](size_t to, size_t from, size_t tap) { sums[tap] += read(grad[to]) * read(x[from]); });
  std::vector<S> found(sums.size());
  depthwise_weight_gradient("op", kDtype<S>,
                            {shape, source(grad, shape.out_height, shape.out_width),
                             source(x, shape.height, shape.width), found.data()},
                            thread_for);
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT(read(found[i]) == sums[i]);
  }
}

template <class S>
void check_all_depthwise() {
  for (const DepthwiseShape& shape : depthwise_shapes()) {
    check_depthwise<S>(shape, false);
    check_depthwise<S>(shape, true);
  }
}

void check_refusals() {
  const TapMaps shape = {1, 2, 3, 0, nullptr, nullptr, false};
  float number = 0;
  EXPECT_THROWS(tap_spread("op", FloatType::kFloat32, {shape, &number, 1, 2, &number}, serial_for),
                "op: rows must lie in [0, 2), got 2 from 1");
  TapMaps negative = shape;
  negative.width = -1;
  EXPECT_THROWS(tap_sum("op", FloatType::kFloat32, {negative, &number, nullptr, {&number, 6, 3, 1}},
                        serial_for),
                "op: sizes must not be negative");
}

}  // namespace

int main() {
  on_every_isa([]<class S>() {
    check_all<S>();
    check_all_depthwise<S>();
    if constexpr (std::is_same_v<S, float>) {
      check_order();
    }
  });
  check_refusals();
  return testing::report("atrous_conv");
}
