// SPDX-License-Identifier: Apache-2.0
// Dense atrous convolutions on a GPU against plain sums in float64: one problem at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "atrous_conv/dense_cuda.h"
#include "driver.h"
#include "float_types.h"

namespace dense_checks {

using pydense::DenseConvArgs;
using pydense::DenseConvShape;
using pydense::FloatType;
using simt::kEpsilon;
using simt::kFloatType;
using simt::rounded;
using simt::value;

constexpr const char* kOp = "test";

// Numbers that TF32 holds, so that products are exact in every type.
template <class T>
void fill_exactly(simt::Buffer<T>& to, uint64_t seed) {
  const std::vector<double> values = simt::random_values(to.size(), seed);
  for (size_t i = 0; i < to.size(); ++i) {
    to[i] = rounded<T>(
        static_cast<double>(pydense::to_float(__float2half_rn(static_cast<float>(values[i])))));
  }
}

// Of numbers [batches, channels, height, width] in memory, `gap` elements between rows.
struct Strides {
  int64_t batch;
  int64_t channel;
  int64_t row;
  int64_t pixel;

  Strides(int64_t channels, int64_t height, int64_t width, bool last, int64_t gap = 0)
      : batch(0), channel(last ? 1 : 0), row(0), pixel(last ? channels + gap : 1) {
    row = last ? width * pixel : width + gap;
    if (!last) {
      channel = height * row;
    }
    batch = last ? height * row : channels * channel;
  }
  size_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<size_t>(n * batch + c * channel + y * row + x * pixel);
  }
};

struct Options {
  bool last = false;         // x and out
  bool weight_last = false;  // the weight's channels side by side
  bool transposed = false;   // the weight is (channels, outputs), turned round
  bool factors = true;       // scale, bias and ReLU
  int64_t gap = 0;           // elements between rows or pixels
  size_t skip = 0;           // elements before the first one
  bool check = true;         // whether results are looked at
};

// A kernel of its branch.
struct Branch {
  int64_t outputs;
  int64_t kernel_height;
  int64_t kernel_width;
  int64_t dilation_y;
  int64_t dilation_x;
  int64_t top;
  int64_t left;
  int64_t bottom;
  int64_t right;

  static Branch same(int64_t outputs, int64_t rate, int64_t kernel = 3) {
    const int64_t reach = kernel / 2 * rate;
    return {outputs, kernel, kernel, rate, rate, reach, reach, reach, reach};
  }
  int64_t taps() const { return kernel_height * kernel_width; }
};

template <class T>
struct Weight {
  simt::Buffer<T> data;
  simt::Buffer<float> scale;
  simt::Buffer<float> bias;
  int64_t output;
  int64_t channel;
  int64_t tap;
  bool flipped;

  Weight(const Branch& branch, int64_t channels, const Options& options, uint64_t seed)
      : data(static_cast<size_t>(branch.outputs * channels * branch.taps()) + options.skip,
             "weight"),
        scale(static_cast<size_t>(branch.outputs), "scale"),
        bias(static_cast<size_t>(branch.outputs), "bias"),
        flipped(options.transposed) {
    fill_exactly(data, seed);
    fill_exactly(scale, seed + 1);
    fill_exactly(bias, seed + 2);
    const int64_t inner = options.transposed ? branch.outputs : channels;
    const int64_t across = options.weight_last ? 1 : branch.taps();
    tap = options.weight_last ? inner : 1;
    output = options.transposed ? across : inner * branch.taps();
    channel = options.transposed ? inner * branch.taps() : across;
  }
  double at(int64_t o, int64_t c, int64_t t, int64_t taps, size_t skip) const {
    const int64_t own = flipped ? taps - 1 - t : t;
    return value(data[static_cast<size_t>(o * output + c * channel + own * tap) + skip]);
  }
};

template <class T>
void convolve(int64_t batches, int64_t channels, int64_t height, int64_t width,
              const std::vector<Branch>& branches, const Options& options) {
  const Strides in(channels, height, width, options.last, options.gap);
  simt::Buffer<T> x(static_cast<size_t>(batches * in.batch) + options.skip, "x");
  fill_exactly(x, 1);
  int64_t outputs = 0;
  std::vector<std::unique_ptr<Weight<T>>> weights;
  for (const Branch& branch : branches) {
    weights.push_back(
        std::make_unique<Weight<T>>(branch, channels, options, 10 + 10 * weights.size()));
    outputs += branch.outputs;
  }
  const Branch& first = branches[0];
  const int64_t out_height =
      height + first.top + first.bottom - (first.kernel_height - 1) * first.dilation_y;
  const int64_t out_width =
      width + first.left + first.right - (first.kernel_width - 1) * first.dilation_x;
  const Strides to(outputs, out_height, out_width, options.last, options.gap);
  simt::Buffer<T> out(static_cast<size_t>(batches * to.batch) + options.skip, "out");
  std::vector<DenseConvArgs> all;
  int64_t offset = 0;
  for (size_t i = 0; i < branches.size(); ++i) {
    const Branch& b = branches[i];
    Weight<T>& w = *weights[i];
    all.push_back({{batches, channels, b.outputs, height, width, out_height, out_width,
                    b.kernel_height, b.kernel_width, b.dilation_y, b.dilation_x, b.top, b.left},
                   {x.data() + options.skip, in.batch, in.channel, in.row, in.pixel},
                   {w.data.data() + options.skip, w.output, w.channel, w.tap, w.flipped},
                   nullptr,
                   options.factors ? w.scale.data() : nullptr,
                   options.factors ? w.bias.data() : nullptr,
                   options.factors,
                   {out.data() + options.skip + offset * to.channel, to.batch, to.channel, to.row,
                    to.pixel}});
    offset += b.outputs;
  }
  const pydense::DenseConvCudaArgs args = {all.data(), static_cast<int>(all.size())};
  simt::Buffer<uint8_t> workspace(
      static_cast<size_t>(pydense::dense_conv_cuda_workspace(kOp, kFloatType<T>, args)),
      "workspace");
  pydense::dense_conv_cuda(kOp, kFloatType<T>, args, workspace.data(), 0, nullptr);
  if (!options.check) {
    return;
  }
  int64_t before = 0;
  for (size_t i = 0; i < branches.size(); ++i) {
    const Branch& b = branches[i];
    const Weight<T>& w = *weights[i];
    for (int64_t n = 0; n < batches; ++n) {
      for (int64_t o = 0; o < b.outputs; ++o) {
        for (int64_t y = 0; y < out_height; ++y) {
          for (int64_t u = 0; u < out_width; ++u) {
            double sum = 0;
            double terms = 1;
            for (int64_t t = 0; t < b.taps(); ++t) {
              const int64_t from_y = y + t / b.kernel_width * b.dilation_y - b.top;
              const int64_t from_x = u + t % b.kernel_width * b.dilation_x - b.left;
              if (from_y < 0 || from_y >= height || from_x < 0 || from_x >= width) {
                continue;
              }
              for (int64_t c = 0; c < channels; ++c) {
                sum += w.at(o, c, t, b.taps(), options.skip) *
                       value(x[in.at(n, c, from_y, from_x) + options.skip]);
              }
              terms += static_cast<double>(channels);
            }
            if (options.factors) {
              const auto own = static_cast<size_t>(o);
              sum = std::max(0.0, value(w.scale[own]) * sum + value(w.bias[own]));
            }
            simt::expect_close_at(__FILE__, __LINE__,
                                  value(out[to.at(n, before + o, y, u) + options.skip]), sum,
                                  kEpsilon<T>, terms * 0x1p-24, to.at(n, before + o, y, u));
          }
        }
      }
    }
    before += b.outputs;
  }
}

template <class T>
void weight_gradient(int64_t batches, int64_t channels, int64_t height, int64_t width,
                     const Branch& b, const Options& options) {
  const int64_t out_height = height + b.top + b.bottom - (b.kernel_height - 1) * b.dilation_y;
  const int64_t out_width = width + b.left + b.right - (b.kernel_width - 1) * b.dilation_x;
  const Strides in(channels, height, width, options.last, options.gap);
  const Strides of_out(b.outputs, out_height, out_width, options.weight_last, options.gap);
  simt::Buffer<T> x(static_cast<size_t>(batches * in.batch) + options.skip, "x");
  simt::Buffer<T> grad(static_cast<size_t>(batches * of_out.batch) + options.skip, "grad");
  simt::Buffer<T> weight(static_cast<size_t>(b.outputs * channels * b.taps()), "weight");
  fill_exactly(x, 1);
  fill_exactly(grad, 2);
  const pydense::DenseConvGradientArgs args = {
      {batches, channels, b.outputs, height, width, out_height, out_width, b.kernel_height,
       b.kernel_width, b.dilation_y, b.dilation_x, b.top, b.left},
      {grad.data() + options.skip, of_out.batch, of_out.channel, of_out.row, of_out.pixel},
      {x.data() + options.skip, in.batch, in.channel, in.row, in.pixel},
      weight.data()};
  simt::Buffer<uint8_t> workspace(
      static_cast<size_t>(
          pydense::dense_conv_weight_gradient_cuda_workspace(kOp, kFloatType<T>, args)),
      "workspace");
  pydense::dense_conv_weight_gradient_cuda(kOp, kFloatType<T>, args, workspace.data(), 0, nullptr);
  if (!options.check) {
    return;
  }
  for (int64_t o = 0; o < b.outputs; ++o) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < b.taps(); ++t) {
        double sum = 0;
        double terms = 1;
        for (int64_t n = 0; n < batches; ++n) {
          for (int64_t y = 0; y < out_height; ++y) {
            for (int64_t u = 0; u < out_width; ++u) {
              const int64_t from_y = y + t / b.kernel_width * b.dilation_y - b.top;
              const int64_t from_x = u + t % b.kernel_width * b.dilation_x - b.left;
              if (from_y >= 0 && from_y < height && from_x >= 0 && from_x < width) {
                sum += value(grad[of_out.at(n, o, y, u) + options.skip]) *
                       value(x[in.at(n, c, from_y, from_x) + options.skip]);
                terms += 1;
              }
            }
          }
        }
        const auto at = static_cast<size_t>((o * channels + c) * b.taps() + t);
        simt::expect_close_at(__FILE__, __LINE__, value(weight[at]), sum, kEpsilon<T>,
                              terms * 0x1p-24, at);
      }
    }
  }
}

}  // namespace dense_checks
