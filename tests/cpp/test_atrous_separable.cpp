// SPDX-License-Identifier: Apache-2.0
// Separable atrous convolution against plain sums, over types, layouts, threads and instruction
// sets. Memory ends with the last number, so that AddressSanitizer sees what reads or writes on.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "atrous_conv/separable.h"
#include "numbers.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::kDtype;
using testing::on_every_isa;
using testing::read;
using testing::thread_for;
using testing::whole_numbers;

namespace {

struct Case {
  DepthwiseShape shape;
  int64_t outputs;
};

// "Same" padding, and more or less of it.
std::vector<Case> cases() {
  const auto shape = [](int64_t n, int64_t c, int64_t h, int64_t w, int64_t kh, int64_t kw,
                        int64_t dy, int64_t dx, int64_t top, int64_t left) {
    return DepthwiseShape{
        n,  c,   h,    w,    h + 2 * top - (kh - 1) * dy, w + 2 * left - (kw - 1) * dx, kh, kw, dy,
        dx, top, left, false};
  };
  return {
      {shape(2, 3, 7, 9, 3, 3, 2, 2, 2, 2), 5},        // one tile
      {shape(1, 300, 6, 33, 3, 3, 5, 18, 5, 18), 37},  // slabs
      {shape(1, 2, 3, 4, 3, 3, 40, 50, 40, 50), 1},    // the centre alone
      {shape(3, 17, 1, 1, 3, 3, 1, 1, 1, 1), 26},
      {shape(1, 1, 3, 1000, 2, 3, 3, 7, 9, 3), 2},  // tiles beside each other
      {shape(2, 16, 8, 20, 1, 5, 1, 2, -1, -3), 13},
      {shape(1, 5, 4, 3, 4, 1, 2, 1, 8, 0), 48},
      {shape(1, 3, 40, 2, 3, 3, 4, 1, 4, 1), 3},  // rows of several phases in a tile
      {shape(1, 2, 5, 4, 600, 1, 1, 1, 600, 0), 2},
  };
}

template <class S>
void check(const Case& c, bool channels_last, bool relu) {
  DepthwiseShape shape = c.shape;
  shape.channels_last = channels_last;
  const int64_t channels = shape.channels;
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  const auto at = [&](int64_t count, int64_t h, int64_t w, int64_t n, int64_t k, int64_t y,
                      int64_t x) {
    return static_cast<size_t>(channels_last ? ((n * h + y) * w + x) * count + k
                                             : ((n * count + k) * h + y) * w + x);
  };
  const std::vector<S> x =
      whole_numbers<S>(shape.batches * channels * shape.height * shape.width, 1, 7);
  const std::vector<S> kernel = whole_numbers<S>(channels * taps, 2, 7);
  const std::vector<S> inner = whole_numbers<S>(channels, 3, 7);
  const std::vector<S> matrix = whole_numbers<S>(c.outputs * channels, 4, 7);
  const std::vector<S> outer = whole_numbers<S>(c.outputs, 5, 7);
  const int64_t pixels = shape.out_height * shape.out_width;
  std::vector<S> out(static_cast<size_t>(shape.batches * c.outputs * pixels));
  const int64_t plane = shape.height * shape.width;
  const SeparableArgs args = {shape,
                              {x.data(), channels * plane, channels_last ? 1 : plane,
                               channels_last ? shape.width * channels : shape.width},
                              kernel.data(),
                              relu ? inner.data() : nullptr,
                              c.outputs,
                              matrix.data(),
                              relu ? outer.data() : nullptr,
                              out.data(),
                              relu,
                              relu};
  separable("op", kDtype<S>, args, serial_for);

  std::vector<double> z(static_cast<size_t>(channels));
  for (int64_t i = 0; i < shape.batches * pixels; ++i) {
    const int64_t n = i / pixels;
    const int64_t y = i % pixels / shape.out_width;
    const int64_t column = i % shape.out_width;
    for (int64_t k = 0; k < channels; ++k) {
      double sum = relu ? read(inner[static_cast<size_t>(k)]) : 0;
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t from_y = y + t / shape.kernel_width * shape.dilation_y - shape.top;
        const int64_t from_x = column + t % shape.kernel_width * shape.dilation_x - shape.left;
        if (from_y >= 0 && from_y < shape.height && from_x >= 0 && from_x < shape.width) {
          sum += read(x[at(channels, shape.height, shape.width, n, k, from_y, from_x)]) *
                 read(kernel[static_cast<size_t>(k * taps + t)]);
        }
      }
      z[static_cast<size_t>(k)] = relu ? std::max(sum, 0.0) : sum;
    }
    for (int64_t o = 0; o < c.outputs; ++o) {
      double sum = relu ? read(outer[static_cast<size_t>(o)]) : 0;
      for (int64_t k = 0; k < channels; ++k) {
        sum += read(matrix[static_cast<size_t>(o * channels + k)]) * z[static_cast<size_t>(k)];
      }
      S rounded;
      portable::store_as(&rounded, static_cast<ComputeOf<S>>(relu ? std::max(sum, 0.0) : sum));
      EXPECT(read(out[at(c.outputs, shape.out_height, shape.out_width, n, o, y, column)]) ==
             read(rounded));
    }
  }
  const std::vector<S> first = out;
  std::fill(out.begin(), out.end(), S{});
  separable("op", kDtype<S>, args, thread_for);
  EXPECT(std::memcmp(out.data(), first.data(), out.size() * sizeof(S)) == 0);
}

template <class S>
void check_all() {
  for (const Case& c : cases()) {
    for (const bool channels_last : {false, true}) {
      check<S>(c, channels_last, false);
      check<S>(c, channels_last, true);
    }
  }
}

void check_refusals() {
  SeparableArgs args = {};
  args.shape = {1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, false};
  EXPECT_THROWS(separable("op", FloatType::kFloat32, args, serial_for),
                "op: channels must be at least 1, got 0 to 0");
  args.shape.channels = 1;
  args.shape.kernel_width = 0;
  EXPECT_THROWS(separable("op", FloatType::kFloat32, args, serial_for),
                "op: kernel size must be in");
}

}  // namespace

int main() {
  on_every_isa([]<class S>() { check_all<S>(); });
  check_refusals();
  return testing::report("atrous_separable");
}
