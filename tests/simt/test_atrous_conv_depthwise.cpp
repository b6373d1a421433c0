// SPDX-License-Identifier: Apache-2.0
// Depthwise atrous convolution on a GPU, and its weight's gradient, against plain loops in float64.
#include <algorithm>
#include <cmath>

#include "atrous_conv/depthwise.h"
#include "driver.h"
#include "float_types.h"

namespace {

using pydense::DepthwiseShape;
using pydense::DepthwiseSource;
using simt::kEpsilon;
using simt::kFloatType;
using simt::rounded;
using simt::value;

constexpr const char* kOp = "test";

struct Kernel {
  int64_t height = 3;
  int64_t width = 3;
  int64_t dilation_y = 1;
  int64_t dilation_x = 1;
};

// With the padding that keeps the size of odd kernels; `more` of it on every side.
DepthwiseShape shape_of(int64_t batches, int64_t channels, int64_t height, int64_t width, bool last,
                        const Kernel& kernel, int64_t more = 0) {
  const int64_t reach_y = (kernel.height - 1) * kernel.dilation_y;
  const int64_t reach_x = (kernel.width - 1) * kernel.dilation_x;
  const int64_t top = reach_y / 2 + more;
  const int64_t left = reach_x / 2 + more;
  return {batches,
          channels,
          height,
          width,
          height + 2 * top - reach_y,
          width + 2 * left - reach_x,
          kernel.height,
          kernel.width,
          kernel.dilation_y,
          kernel.dilation_x,
          top,
          left,
          last};
}

// A picture of one of the sizes, with `gap` elements between its rows.
struct Layout {
  const DepthwiseShape& shape;
  int64_t height;
  int64_t width;
  int64_t gap = 0;

  int64_t pixel() const { return shape.channels_last ? shape.channels : 1; }
  int64_t row() const { return width * pixel() + gap; }
  int64_t channel() const { return shape.channels_last ? 1 : height * row(); }
  int64_t batch() const { return height * row() * (shape.channels_last ? 1 : shape.channels); }
  size_t elements() const { return static_cast<size_t>(shape.batches * batch()); }
  size_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<size_t>(n * batch() + c * channel() + y * row() + x * pixel());
  }
  DepthwiseSource source(const void* data) const { return {data, batch(), channel(), row()}; }
};

// fn(n, c, y, x, tap, row and column of x) for each tap that reads a pixel.
template <class Fn>
void for_each_product(const DepthwiseShape& s, const Fn& fn) {
  for (int64_t n = 0; n < s.batches; ++n) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t y = 0; y < s.out_height; ++y) {
        for (int64_t x = 0; x < s.out_width; ++x) {
          for (int64_t k = 0; k < s.kernel_height * s.kernel_width; ++k) {
            const int64_t row = y + k / s.kernel_width * s.dilation_y - s.top;
            const int64_t column = x + k % s.kernel_width * s.dilation_x - s.left;
            if (row >= 0 && row < s.height && column >= 0 && column < s.width) {
              fn(n, c, y, x, k, row, column);
            }
          }
        }
      }
    }
  }
}

template <class T>
void check(const DepthwiseShape& shape, int64_t gap = 0) {
  const Layout in = {shape, shape.height, shape.width, gap};
  const Layout out = {shape, shape.out_height, shape.out_width};
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  simt::Buffer<T> x(in.elements(), "x");
  simt::Buffer<T> weight(static_cast<size_t>(shape.channels * taps), "weight");
  simt::Buffer<T> bias(static_cast<size_t>(shape.channels), "bias");
  simt::fill(x, 1);
  simt::fill(weight, 2);
  simt::fill(bias, 3);
  const double exact = 64 * std::min(kEpsilon<T>, kEpsilon<float>);
  for (const bool plain : {true, false}) {  // else flipped, with ReLU and a bias
    simt::Buffer<T> result(out.elements(), "out");
    pydense::depthwise_cuda(kOp, kFloatType<T>,
                            {shape, in.source(x.data()), weight.data(),
                             plain ? nullptr : bias.data(), result.data(), !plain, !plain},
                            0, nullptr);
    std::vector<double> expected(out.elements());
    if (!plain) {
      for (size_t i = 0; i < expected.size(); ++i) {
        const size_t plane = static_cast<size_t>(shape.out_height * shape.out_width);
        const auto channels = static_cast<size_t>(shape.channels);
        expected[i] = value(bias[shape.channels_last ? i % channels : i / plane % channels]);
      }
    }
    for_each_product(shape, [&](int64_t n, int64_t c, int64_t y, int64_t i, int64_t k, int64_t row,
                                int64_t column) {
      expected[out.at(n, c, y, i)] +=
          value(weight[static_cast<size_t>(c * taps + (plain ? k : taps - 1 - k))]) *
          value(x[in.at(n, c, row, column)]);
    });
    if (!plain) {
      for (double& number : expected) {
        number = std::max(number, 0.0);
      }
    }
    simt::expect_close(result, expected, kEpsilon<T>, exact);
  }

  const Layout grads = {shape, shape.out_height, shape.out_width, gap};
  simt::Buffer<T> grad(grads.elements(), "grad");
  simt::fill(grad, 4);
  simt::Buffer<T> of_weight(weight.size(), "gradient");
  simt::Buffer<pydense::Accumulate<T>> workspace(
      static_cast<size_t>(pydense::depthwise_gradient_sums(kOp, shape)), "workspace");
  pydense::depthwise_gradient_cuda(
      kOp, kFloatType<T>, {shape, grads.source(grad.data()), in.source(x.data()), of_weight.data()},
      workspace.data(), 0, nullptr);
  std::vector<double> expected(weight.size());
  for_each_product(shape, [&](int64_t n, int64_t c, int64_t y, int64_t i, int64_t k, int64_t row,
                              int64_t column) {
    expected[static_cast<size_t>(c * taps + k)] +=
        value(grad[grads.at(n, c, y, i)]) * value(x[in.at(n, c, row, column)]);
  });
  const auto numbers = static_cast<double>(1 + shape.batches * shape.out_height * shape.out_width);
  simt::expect_close(of_weight, expected, kEpsilon<T>, exact * std::sqrt(numbers));
}

void every_dtype() {
  for (const bool last : {false, true}) {
    for (const Kernel& kernel : {Kernel{3, 3, 2, 3}, Kernel{2, 3, 3, 1}}) {
      const DepthwiseShape shape = shape_of(2, 8, 7, 9, last, kernel, 1);
      check<float>(shape);
      check<double>(shape);
      check<__nv_bfloat16>(shape);
      check<__half>(shape);
    }
  }
}

// One pixel, rates of the picture's size and beyond, channels that are no multiple of a vector, and
// more than a block has; columns that are cut; several blocks to a plane.
void sizes() {
  for (const bool last : {false, true}) {
    check<float>(shape_of(1, 3, 1, 1, last, {3, 3, 1, 1}));
    check<__nv_bfloat16>(shape_of(2, 5, 6, 7, last, {3, 3, 6, 40}));
    check<float>(shape_of(1, last ? 132 : 4, 5, 6, last, {3, 3, 2, 2}));
    check<__half>(shape_of(1, last ? 37 : 2, 4, 5, last, {3, 3, 1, 2}));
    check<float>(shape_of(1, 4, 45, 11, last, {3, 3, 1, 1}));
    check<float>(shape_of(1, 1, 3, 270, last, {3, 3, 2, 90}));
    check<double>(shape_of(1, 3, 40, 3, last, {5, 1, 3, 1}));
    check<float>(shape_of(3, 4, 9, 17, last, {3, 3, 4, 4}, 30));
  }
}

// Rows with gaps between: with vectors, and where they would not be aligned.
void gaps() {
  for (const int64_t gap : {3, 8}) {
    for (const bool last : {false, true}) {
      check<float>(shape_of(2, 8, 6, 7, last, {3, 3, 2, 2}), gap);
      check<__half>(shape_of(2, 8, 5, 6, last, {3, 2, 1, 2}), gap);
    }
  }
}

void nothing() {
  check<float>(shape_of(0, 3, 4, 5, false, {}));
  check<float>(shape_of(2, 0, 4, 5, true, {}));
}

void random_shapes() {
  std::mt19937_64 generator(simt::config().seed);
  const auto any = [&](int64_t from, int64_t to) {
    return from + static_cast<int64_t>(generator() % static_cast<uint64_t>(to - from + 1));
  };
  for (int i = 0; i < 6; ++i) {
    const bool columns = any(0, 2) > 0;
    const Kernel kernel = {columns ? 3 : any(1, 4), columns ? 3 : any(1, 4), any(1, 6), any(1, 6)};
    // The padding keeps odd kernels' size; even ones lose a pixel of each rate.
    const DepthwiseShape shape = shape_of(any(1, 2), any(1, 12), any(1, 14), any(1, 14),
                                          any(0, 1) == 1, kernel, 6 + any(0, 3));
    check<float>(shape, any(0, 2));
    check<__nv_bfloat16>(shape, any(0, 2));
  }
}

// Past 2^31 elements: the blocks of the last plane alone, on memory that is not there.
void beyond_32_bits() {
  constexpr int64_t kSide = 64;
  constexpr int64_t kPlane = kSide * kSide;
  constexpr int64_t kPlanes = (int64_t{1} << 31) / kPlane + 16;
  for (const bool last : {false, true}) {
    const DepthwiseShape shape =
        shape_of(last ? kPlanes / 16 : 1, last ? 16 : kPlanes, kSide, kSide, last, {3, 3, 8, 8});
    const Layout layout = {shape, kSide, kSide};
    simt::SparseMemory x(layout.elements() * sizeof(__half));
    simt::SparseMemory out(layout.elements() * sizeof(__half));
    simt::SparseMemory weight(static_cast<size_t>(shape.channels) * 9 * sizeof(__half));
    const int64_t n = shape.batches - 1;
    const int64_t c = shape.channels - 1;
    weight.as<__half>()[c * 9 + 8] = rounded<__half>(2);
    x.as<__half>()[layout.at(n, c, kSide - 1, kSide - 1)] = rounded<__half>(3);
    // Contiguous: 512 columns to a plane, 2 blocks; channels_last: 512 columns, 128 to a block.
    const uint64_t blocks = static_cast<uint64_t>(last ? shape.batches * 4 : kPlanes * 2);
    simt::config().only_blocks = {blocks - 2, blocks - 1};
    pydense::depthwise_cuda(kOp, pydense::FloatType::kFloat16,
                            {shape, layout.source(x.as<__half>()), weight.as<__half>(), nullptr,
                             out.as<__half>(), false, false},
                            0, nullptr);
    simt::config().only_blocks.clear();
    SIMT_EXPECT(value(out.as<__half>()[layout.at(n, c, kSide - 9, kSide - 9)]) == 6);
  }
}

// ---- what is asked of memory -------------------------------------------------------------------
// A few channels of DeepLab v3's branches, which stand for all 2048.

template <class T>
void count(const char* name, const DepthwiseShape& whole, int64_t channels) {
  DepthwiseShape shape = whole;
  shape.channels = channels;
  const Layout layout = {shape, shape.height, shape.width};
  simt::Buffer<T> x(layout.elements(), "x");
  simt::Buffer<T> out(layout.elements(), "out");
  simt::Buffer<T> weight(static_cast<size_t>(channels * 9), "weight");
  simt::Buffer<float> workspace(static_cast<size_t>(pydense::depthwise_gradient_sums(kOp, shape)),
                                "workspace");
  simt::fill(x, 1);
  simt::fill(out, 2);
  simt::fill(weight, 3);
  const auto bytes = static_cast<double>((2 * x.size() + weight.size()) * sizeof(T));
  simt::Limits limits{.kernel = shape.channels_last ? "depthwise_last_kernel" : "depthwise_kernel",
                      .minimum_bytes = bytes};
  limits.shape = name;
  limits.scale = static_cast<double>(whole.channels) / static_cast<double>(channels);
  if (!shape.channels_last) {
    limits.sectors = 2.0;
    limits.reason = "rows of 65 pixels, and what their taps read, begin between sectors";
  }
  simt::counted(limits, [&] {
    pydense::depthwise_cuda(
        kOp, kFloatType<T>,
        {shape, layout.source(x.data()), weight.data(), nullptr, out.data(), false, false}, 0,
        nullptr);
  });
  simt::Limits gradient = limits;
  gradient.kernel = "depthwise_gradient_kernel";
  gradient.minimum_bytes = static_cast<double>(2 * x.size() * sizeof(T) + 4 * workspace.size());
  simt::Limits sum = limits;
  sum.kernel = "depthwise_gradient_sum_kernel";
  sum.minimum_bytes =
      4.0 * static_cast<double>(workspace.size()) + static_cast<double>(weight.size() * sizeof(T));
  simt::counted({gradient, sum}, [&] {
    pydense::depthwise_gradient_cuda(
        kOp, kFloatType<T>,
        {shape, layout.source(out.data()), layout.source(x.data()), weight.data()},
        workspace.data(), 0, nullptr);
  });
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  const Kernel kernel = {3, 3, 12, 12};
  count<__nv_bfloat16>("1 x 2048 x 65 x 65, rate 12, bfloat16",
                       shape_of(1, 2048, 65, 65, false, kernel), 32);
  count<__nv_bfloat16>("1 x 2048 x 65 x 65, rate 12, bfloat16, channels_last",
                       shape_of(1, 2048, 65, 65, true, kernel), 128);
  count<float>("1 x 2048 x 65 x 65, rate 12, float32", shape_of(1, 2048, 65, 65, false, kernel),
               32);
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(
      argc, argv,
      {
          {"every dtype", every_dtype},
          {"sizes", sizes},
          {"gaps between rows", gaps},
          {"nothing", nothing},
          {"random shapes", random_shapes, simt::kRelease},
          {"2^31 + 65536 elements", beyond_32_bits, simt::kRelease | simt::kAsan},
          {"counters", counters, simt::kTrace},
      });
}
