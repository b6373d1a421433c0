// SPDX-License-Identifier: Apache-2.0
// Depthwise-separable atrous convolution on a GPU, in one pass. Numbers are small and whole, so
// that every sum is exact in every type, and a result is rounded once.
#include <algorithm>
#include <cmath>

#include "atrous_conv/separable.h"
#include "driver.h"
#include "float_types.h"

namespace {

using pydense::DepthwiseShape;
using pydense::FloatType;
using pydense::SeparableArgs;
using simt::kEpsilon;
using simt::kFloatType;
using simt::rounded;
using simt::value;

constexpr const char* kOp = "test";

template <class T>
void fill_whole(simt::Buffer<T>& to, uint64_t seed, double most) {
  const std::vector<double> values = simt::random_values(to.size(), seed, most + 0.49);
  for (size_t i = 0; i < to.size(); ++i) {
    to[i] = rounded<T>(std::nearbyint(values[i]));
  }
}

struct Options {
  bool last = false;
  bool biases = true;  // and ReLU of both convolutions
  int64_t more = 0;    // padding on every side, beside that which keeps the size
  int64_t gap = 0;     // elements between rows of x
  bool check = true;
};

template <class T>
void separable(int64_t batches, int64_t channels, int64_t height, int64_t width, int64_t outputs,
               int64_t rate_y, int64_t rate_x, const Options& options) {
  const int64_t out_height = height + 2 * options.more;
  const int64_t out_width = width + 2 * options.more;
  const DepthwiseShape s = {batches,
                            channels,
                            height,
                            width,
                            out_height,
                            out_width,
                            3,
                            3,
                            rate_y,
                            rate_x,
                            rate_y + options.more,
                            rate_x + options.more,
                            options.last};
  const int64_t pixel = options.last ? channels : 1;
  const int64_t row = width * pixel + options.gap;
  const int64_t plane = options.last ? 1 : height * row;
  const int64_t image = height * row * (options.last ? 1 : channels);
  simt::Buffer<T> x(static_cast<size_t>(batches * image), "x");
  simt::Buffer<T> weight(static_cast<size_t>(channels * 9), "weight");
  simt::Buffer<T> bias(static_cast<size_t>(channels), "bias");
  simt::Buffer<T> matrix(static_cast<size_t>(outputs * channels), "matrix");
  simt::Buffer<float> shift(static_cast<size_t>(outputs), "shift");
  simt::Buffer<T> out(static_cast<size_t>(batches * outputs * out_height * out_width), "out");
  fill_whole(x, 1, 2);
  fill_whole(weight, 2, 1);
  fill_whole(bias, 3, 3);
  fill_whole(matrix, 4, 1);
  fill_whole(shift, 5, 9);
  const SeparableArgs args = {s,
                              {x.data(), image, plane, row},
                              weight.data(),
                              options.biases ? bias.data() : nullptr,
                              outputs,
                              matrix.data(),
                              options.biases ? shift.data() : nullptr,
                              out.data(),
                              options.biases,
                              options.biases};
  simt::Buffer<uint8_t> workspace(
      static_cast<size_t>(pydense::separable_cuda_workspace(kOp, kFloatType<T>, args)),
      "workspace");
  pydense::separable_cuda(kOp, kFloatType<T>, args, workspace.data(), 0, nullptr);
  if (!options.check) {
    return;
  }
  std::vector<double> inner(static_cast<size_t>(channels));
  for (int64_t n = 0; n < batches; ++n) {
    for (int64_t y = 0; y < out_height; ++y) {
      for (int64_t u = 0; u < out_width; ++u) {
        for (int64_t c = 0; c < channels; ++c) {
          double sum = options.biases ? value(bias[static_cast<size_t>(c)]) : 0;
          for (int64_t t = 0; t < 9; ++t) {
            const int64_t from_y = y + t / 3 * rate_y - s.top;
            const int64_t from_x = u + t % 3 * rate_x - s.left;
            if (from_y >= 0 && from_y < height && from_x >= 0 && from_x < width) {
              sum += value(weight[static_cast<size_t>(c * 9 + t)]) *
                     value(x[static_cast<size_t>(n * image + c * plane + from_y * row +
                                                 from_x * pixel)]);
            }
          }
          inner[static_cast<size_t>(c)] = options.biases ? std::max(sum, 0.0) : sum;
        }
        for (int64_t o = 0; o < outputs; ++o) {
          double sum = options.biases ? value(shift[static_cast<size_t>(o)]) : 0;
          for (int64_t c = 0; c < channels; ++c) {
            sum += value(matrix[static_cast<size_t>(o * channels + c)]) *
                   inner[static_cast<size_t>(c)];
          }
          const int64_t place = y * out_width + u;
          const int64_t pixels = out_height * out_width;
          const auto at = static_cast<size_t>(options.last ? (n * pixels + place) * outputs + o
                                                           : (n * outputs + o) * pixels + place);
          const double expected = options.biases ? std::max(sum, 0.0) : sum;
          simt::expect_close_at(__FILE__, __LINE__, value(out[at]), expected, kEpsilon<T>, 0, at);
        }
      }
    }
  }
}

template <class T>
void formats() {
  const bool last = simt::config().seed % 2 == 0;  // a schedule each
  separable<T>(1, 16, 5, 6, 24, 2, 2, {.last = last});
  separable<T>(1, 24, 4, 3, 16, 1, 2, {.last = !last, .biases = false});
}
void dtypes() {
  formats<__nv_bfloat16>();
  formats<__half>();
  formats<float>();
}

// No vector fits: odd numbers of channels and outputs, gaps; one pixel; rates of the map's size and
// beyond; padding that no tap reaches from.
void odd_numbers() {
  const bool last = simt::config().seed % 2 == 0;
  separable<__nv_bfloat16>(2, 13, 4, 5, 7, 2, 3, {.last = last});
  separable<__half>(1, 8, 3, 7, 9, 1, 1, {.last = !last, .gap = 3});
  separable<__half>(1, 8, 3, 7, 8, 1, 1, {.last = last, .gap = 8});
  separable<float>(1, 3, 2, 3, 1, 1, 1, {.last = last});
  separable<__nv_bfloat16>(3, 4, 1, 1, 33, 1, 1, {.last = !last});
  separable<__half>(2, 8, 7, 5, 9, 40, 4, {.last = last});
  separable<__half>(1, 8, 2, 3, 9, 2, 2, {.last = last, .more = 4});
}

// Several tiles of pixels and of outputs; sums in parts.
void several_tiles() {
  const bool last = simt::config().seed % 2 == 0;
  switch (simt::config().seed % 3) {
    case 0:
      return separable<__nv_bfloat16>(2, 40, 11, 17, 140, 3, 3, {.last = last});
    case 1:
      return separable<__half>(1, 328, 9, 15, 264, 4, 4, {.last = !last});
    default:
      return separable<float>(1, 300, 5, 7, 40, 2, 2, {.last = last});
  }
}

void random_shapes() {
  std::mt19937_64 generator(simt::config().seed);
  const auto any = [&](int64_t from, int64_t to) {
    return from + static_cast<int64_t>(generator() % static_cast<uint64_t>(to - from + 1));
  };
  for (int i = 0; i < 6; ++i) {
    const Options options = {
        .last = any(0, 1) == 1, .biases = any(0, 1) == 1, .more = any(0, 2), .gap = any(0, 2)};
    const int64_t channels = any(1, 50);
    const int64_t outputs = any(1, 70);
    separable<__half>(any(1, 2), channels, any(1, 12), any(1, 14), outputs, any(1, 7), any(1, 7),
                      options);
  }
}

void nothing() { separable<__half>(0, 8, 4, 4, 8, 2, 2, {}); }

// What the map between is rounded to, and what becomes of NaN and infinities.
void special_numbers() {
  const DepthwiseShape s = {1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, false};
  simt::Buffer<__half> x(9, "x");
  simt::Buffer<__half> weight(9, "weight");
  simt::Buffer<__half> matrix(1, "matrix");
  simt::Buffer<__half> out(9, "out");
  for (size_t i = 0; i < 9; ++i) {
    x[i] = rounded<__half>(1 + static_cast<double>(i) / 1024);
    weight[i] = rounded<__half>(INFINITY);  // of the padding alone
  }
  x[2] = rounded<__half>(NAN);
  weight[4] = rounded<__half>(1 + 1.0 / 1024);
  matrix[0] = rounded<__half>(1);
  const SeparableArgs args = {
      s,       {x.data(), 9, 9, 3}, weight.data(), nullptr, 1, matrix.data(),
      nullptr, out.data(),          true,          true};
  simt::Buffer<uint8_t> workspace(
      static_cast<size_t>(pydense::separable_cuda_workspace(kOp, FloatType::kFloat16, args)),
      "workspace");
  pydense::separable_cuda(kOp, FloatType::kFloat16, args, workspace.data(), 0, nullptr);
  for (size_t i = 0; i < 9; ++i) {
    const double exact = value(x[i]) * value(weight[4]);
    SIMT_EXPECT(i == 2 ? std::isnan(value(out[i]))
                       : value(out[i]) == value(rounded<__half>(exact)));
  }
}

// Past 2^31 elements: the block of the last pixels alone, on memory that is not there.
void beyond_32_bits() {
  constexpr int64_t kWidth = 1024;
  constexpr int64_t kHeight = (int64_t{1} << 31) / 8 / kWidth + 1;
  constexpr int64_t kNumbers = kHeight * kWidth * 8;
  simt::SparseMemory x(kNumbers * sizeof(__half));
  simt::SparseMemory out(kNumbers * sizeof(__half));
  simt::Buffer<__half> weight(72, "weight");
  simt::Buffer<__half> matrix(64, "matrix");
  fill_whole(weight, 1, 2);
  fill_whole(matrix, 2, 2);
  x.as<__half>()[kNumbers - 8 + 3] = rounded<__half>(2);
  const int64_t row = kWidth * 8;
  const SeparableArgs args = {{1, 8, kHeight, kWidth, kHeight, kWidth, 3, 3, 1, 1, 1, 1, true},
                              {x.as<__half>(), kNumbers, 1, row},
                              weight.data(),
                              nullptr,
                              8,
                              matrix.data(),
                              nullptr,
                              out.as<__half>(),
                              false,
                              false};
  simt::Buffer<uint8_t> workspace(
      static_cast<size_t>(pydense::separable_cuda_workspace(kOp, FloatType::kFloat16, args)),
      "workspace");
  simt::config().only_blocks = {static_cast<uint64_t>(kHeight * kWidth / 128 - 1)};
  pydense::separable_cuda(kOp, FloatType::kFloat16, args, workspace.data(), 0, nullptr);
  simt::config().only_blocks.clear();
  for (size_t o = 0; o < 8; ++o) {
    __half& got = out.as<__half>()[kNumbers - 8 + static_cast<int64_t>(o)];
    SIMT_EXPECT(value(got) == 2 * value(weight[3 * 9 + 4]) * value(matrix[o * 8 + 3]));
    got = rounded<__half>(0);
  }
  x.as<__half>()[kNumbers - 8 + 3] = rounded<__half>(0);
}

// ---- what is asked of memory -------------------------------------------------------------------

// A few channels, which stand for all of them; no sums in parts.
template <class T>
void count(const char* name, int64_t size, int64_t channels, int64_t whole, int64_t outputs,
           int64_t rate, bool last) {
  const auto pixels = static_cast<double>(size * size);
  const auto numbers = static_cast<double>(channels * (9 + outputs));
  const double bytes =
      (pixels * static_cast<double>(channels + outputs) + numbers) * static_cast<double>(sizeof(T));
  simt::Limits limits{.kernel = "separable_mma_kernel", .minimum_bytes = bytes};
  limits.shape = name;
  limits.scale = static_cast<double>(whole) / static_cast<double>(channels);
  if (!last) {
    limits.sectors = 2.0;
    limits.reason = "rows of 65 pixels, and what their taps read, begin between sectors";
  }
  simt::counted(limits, [&] {
    separable<T>(1, channels, size, size, outputs, rate, rate,
                 {.last = last, .biases = false, .check = false});
  });
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  count<__nv_bfloat16>("1 x 2048 x 65 x 65 to 256, rate 12, bfloat16, channels_last", 65, 64, 2048,
                       256, 12, true);
  count<__nv_bfloat16>("1 x 2048 x 65 x 65 to 256, rate 12, bfloat16", 65, 64, 2048, 256, 12,
                       false);
  count<float>("1 x 2048 x 65 x 65 to 256, rate 12, TF32, channels_last", 65, 32, 2048, 256, 12,
               true);
  count<__nv_bfloat16>("1 x 304 x 129 x 129 to 256, rate 1, bfloat16, channels_last", 129, 32, 304,
                       256, 1, true);
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"every dtype", dtypes},
                             {"odd numbers", odd_numbers},
                             {"several tiles", several_tiles},
                             {"random shapes", random_shapes, simt::kRelease},
                             {"nothing", nothing},
                             {"special numbers", special_numbers},
                             {"2^31 + 1024 elements", beyond_32_bits, simt::kRelease | simt::kAsan},
                             {"counters", counters, simt::kTrace},
                         });
}
