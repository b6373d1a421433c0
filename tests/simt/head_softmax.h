// SPDX-License-Identifier: Apache-2.0
// Cases of upsampled softmax and its gradient for test_segmentation_head.cpp.
#pragma once

#include <limits>

#include "head_logits.h"
#include "segmentation_head/segmentation_head_cuda.h"

namespace {

template <class S>
void softmax_of(simt::Logits<S>& logits, Layout layout) {
  using T = Accumulate<S>;
  const HeadCase& c = logits.size;
  simt::Array<S> got(c.images, c.classes, c.out_height, c.out_width, layout, "probabilities");
  pydense::UpsampleSoftmaxCudaArgs<T> args = {logits.view(), simt::axes_of<T>(c), got.data(), {}};
  std::copy_n(got.strides().begin(), 4, args.strides);
  upsample_softmax_cuda(args, 0, nullptr);
  const double tolerance = sizeof(S) == 8 ? 1e-12 : sizeof(S) == 4 ? 2e-5 : 5e-3;
  size_t i = 0;
  simt::for_each_output(c, [&](int64_t n, int64_t y, int64_t x) {
    const std::vector<double> expected = simt::softmax(logits.upsampled(n, y, x));
    for (int64_t k = 0; k < c.classes; ++k) {
      simt::expect_close_at(__FILE__, __LINE__, got.value(n, k, y, x),
                            expected[static_cast<size_t>(k)], tolerance, 1e-7, i++);
    }
  });
}

template <class S>
void softmax() {
  for (HeadCase c : {HeadCase{1, 1, 1, 1, 1, 1, false, Layout::kContiguous},
                     HeadCase{2, 3, 4, 5, 17, 23, false, Layout::kChannelsLast},
                     HeadCase{1, 21, 3, 11, 13, 141, true, Layout::kContiguous},
                     HeadCase{1, 5, 20, 30, 7, 11, false, Layout::kGaps},
                     HeadCase{1, 17, 3, 400, 2, 130, false, Layout::kContiguous}}) {
    for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
      simt::Logits<S> logits(c);
      softmax_of(logits, layout);
    }
  }
}

void softmax_of_extremes() {
  simt::Logits<float> logits({1, 4, 3, 9, 9, 70, false, Layout::kContiguous}, 1e4);
  softmax_of(logits, Layout::kContiguous);
  logits.fill(3, 4);
  logits.set(0, 1, 1, 2, kNan);
  logits.set(0, 2, 1, 5, kInfinity);
  logits.set(0, 3, 1, 8, -kInfinity);
  softmax_of(logits, Layout::kContiguous);
  softmax_of(logits, Layout::kChannelsLast);
}

template <class T>
std::vector<double> gradient_of(const HeadCase& c, const std::vector<std::vector<double>>& falls) {
  const pydense::HeadAxes<T> axes = simt::axes_of<T>(c);
  std::vector<double> sums(static_cast<size_t>(c.images * c.classes * c.height * c.width));
  size_t output = 0;
  simt::for_each_output(c, [&](int64_t n, int64_t y, int64_t x) {
    const auto row = pydense::portable::axis_taps(axes.y, y);
    const auto column = pydense::portable::axis_taps(axes.x, x);
    for (int64_t k = 0; k < c.classes; ++k) {
      const double fall = falls[output][static_cast<size_t>(k)];
      const auto add = [&](int64_t i, int64_t j, T weight_y, T weight_x) {
        sums[static_cast<size_t>(((n * c.classes + k) * c.height + i) * c.width + j)] +=
            static_cast<double>(weight_y) * static_cast<double>(weight_x) * fall;
      };
      add(row.i0, column.i0, row.w0, column.w0);
      add(row.i0, column.i1, row.w0, column.w1);
      add(row.i1, column.i0, row.w1, column.w0);
      add(row.i1, column.i1, row.w1, column.w1);
    }
    ++output;
  });
  return sums;
}

template <class S>
void softmax_backward_of(const HeadCase& c, Layout upstream_layout, double upstream_scale = 2) {
  using T = Accumulate<S>;
  simt::Logits<S> logits(c);
  simt::Array<S> upstream(c.images, c.classes, c.out_height, c.out_width, upstream_layout,
                          "upstream");
  upstream.fill(12, upstream_scale);
  const Layout layout =
      c.layout == Layout::kChannelsLast ? Layout::kChannelsLast : Layout::kContiguous;
  simt::Array<T> got(c.images, c.classes, c.height, c.width, layout, "gradient");
  const pydense::HeadAxes<T> axes = simt::axes_of<T>(c);
  simt::Buffer<T> parts(static_cast<size_t>(pydense::softmax_backward_parts(logits.view(), axes)),
                        "parts");
  pydense::UpsampleSoftmaxBackwardCudaArgs<T> args = {
      logits.view(), axes, upstream.data(), {}, got.data(), layout == Layout::kChannelsLast,
      parts.data()};
  std::copy_n(upstream.strides().begin(), 4, args.strides);
  upsample_softmax_backward_cuda(args, 0, nullptr);
  std::vector<std::vector<double>> falls;
  simt::for_each_output(c, [&](int64_t n, int64_t y, int64_t x) {
    std::vector<double> p = simt::softmax(logits.upsampled(n, y, x));
    double mean = 0;
    for (size_t k = 0; k < p.size(); ++k) {
      mean += p[k] * upstream.value(n, static_cast<int64_t>(k), y, x);
    }
    for (size_t k = 0; k < p.size(); ++k) {
      p[k] *= upstream.value(n, static_cast<int64_t>(k), y, x) - mean;
    }
    falls.push_back(std::move(p));
  });
  const std::vector<double> expected = gradient_of<T>(c, falls);
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 2e-5;
  const double outputs = std::max(1.0, static_cast<double>(c.out_height * c.out_width) /
                                           static_cast<double>(c.height * c.width));
  size_t i = 0;
  for (int64_t n = 0; n < c.images; ++n) {
    for (int64_t k = 0; k < c.classes; ++k) {
      for (int64_t y = 0; y < c.height; ++y) {
        for (int64_t x = 0; x < c.width; ++x) {
          simt::expect_close_at(__FILE__, __LINE__, got.value(n, k, y, x), expected[i], tolerance,
                                tolerance * outputs, i);
          ++i;
        }
      }
    }
  }
}

// Several tiles along x, and cells of more outputs than a block has rows or columns.
template <class S>
void softmax_backward() {
  softmax_backward_of<S>({1, 1, 1, 1, 1, 1, false, Layout::kContiguous}, Layout::kContiguous);
  softmax_backward_of<S>({2, 6, 4, 5, 17, 23, false, Layout::kChannelsLast}, Layout::kContiguous);
  softmax_backward_of<S>({1, 5, 3, 21, 7, 170, true, Layout::kContiguous}, Layout::kChannelsLast);
  softmax_backward_of<S>({1, 3, 2, 2, 21, 300, false, Layout::kGaps}, Layout::kContiguous);
  softmax_backward_of<S>({1, 5, 20, 30, 7, 11, false, Layout::kGaps}, Layout::kGaps);
  softmax_backward_of<S>({1, 3, 2, 300, 2, 100, false, Layout::kContiguous}, Layout::kContiguous);
  softmax_backward_of<S>({1, 2, 3, 130, 3, 130, true, Layout::kContiguous}, Layout::kContiguous);
  // Two whole blocks of columns in the first cell, none in the second.
  softmax_backward_of<S>({1, 3, 2, 2, 3, 257, true, Layout::kContiguous}, Layout::kContiguous);
}
// More classes than shared memory holds.
void softmax_backward_in_parts() {
  softmax_backward_of<float>({1, 210, 2, 24, 5, 130, false, Layout::kChannelsLast},
                             Layout::kContiguous);
}

void softmax_of_no_images() {
  simt::Logits<float> none({0, 3, 2, 2, 4, 4, false, Layout::kContiguous});
  const pydense::HeadAxes<float> axes = simt::axes_of<float>(none.size);
  pydense::upsample_softmax_cuda<float>({none.view(), axes, nullptr, {}}, 0, nullptr);
  SIMT_EXPECT(softmax_backward_parts(none.view(), axes) == 0);
  pydense::upsample_softmax_backward_cuda<float>(
      {none.view(), axes, nullptr, {}, nullptr, false, nullptr}, 0, nullptr);
}

// More blocks than a grid has: the first ones take the last image, too.
void softmax_of_many_images() {
  const simt::ManyImages many;
  const HeadCase& c = many.size;
  const auto bytes = static_cast<size_t>(c.images) * 24 * 4;
  const auto strides = simt::strides_of(2, 3, 4, Layout::kContiguous);
  simt::SparseMemory out(bytes);
  pydense::UpsampleSoftmaxCudaArgs<float> args = {
      many.view, simt::axes_of<float>(c), out.as<float>(), {}};
  std::copy_n(strides.begin(), 4, args.strides);
  simt::config().only_blocks = {0};
  upsample_softmax_cuda(args, 0, nullptr);
  const double p = 1 / (1 + std::exp(-1.0));
  const float* const end = out.as<float>() + c.images * 24;
  simt::expect_close_at(__FILE__, __LINE__, end[-1], p, 1e-6, 0, 0);
  simt::expect_close_at(__FILE__, __LINE__, end[-24], 1 - p, 1e-6, 0, 0);
  SIMT_EXPECT(end[-25] == 0);

  // Two blocks for each image; of the sums, the last block alone.
  simt::SparseMemory upstream(bytes);
  simt::SparseMemory gradient(static_cast<size_t>(c.images) * 12 * 4);
  simt::SparseMemory parts(static_cast<size_t>(softmax_backward_parts(many.view, args.axes)) *
                           sizeof(float));
  for (int64_t k = 12; k < 24; ++k) {
    upstream.as<float>()[(c.images - 1) * 24 + k] = 1;
  }
  pydense::UpsampleSoftmaxBackwardCudaArgs<float> backward = {
      many.view, args.axes,        upstream.as<float>(), {}, gradient.as<float>(),
      false,     parts.as<float>()};
  std::copy_n(strides.begin(), 4, backward.strides);
  simt::config().only_blocks = {0, 1, static_cast<uint64_t>((c.images * 12 - 1) / 128) % (1 << 20)};
  upsample_softmax_backward_cuda(backward, 0, nullptr);
  simt::config().only_blocks.clear();
  double sum = 0;
  const float* const last = gradient.as<float>() + c.images * 12;
  for (int64_t k = 1; k <= 6; ++k) {
    sum += static_cast<double>(last[-k]);
  }
  simt::expect_close_at(__FILE__, __LINE__, sum, 12 * p * (1 - p), 1e-5, 0, 0);
}

// Past 2^31 probabilities: the last block alone.
void softmax_beyond_32_bits() {
  constexpr int64_t kImages = (int64_t{1} << 14) + 3;
  const HeadCase c = {kImages, 128, 4, 9, 8, 128, true, Layout::kContiguous};
  simt::SparseMemory memory(static_cast<size_t>(kImages) * 128 * 36 * 4);
  simt::SparseMemory out(static_cast<size_t>(kImages) * 128 * 1024 * 4);
  pydense::LogitsView view = {
      memory.as<float>(), pydense::FloatType::kFloat32, kImages, 128, 4, 9, {}};
  std::copy_n(simt::strides_of(128, 4, 9, c.layout).begin(), 4, view.strides);
  pydense::UpsampleSoftmaxCudaArgs<float> args = {
      view, simt::axes_of<float>(c), out.as<float>(), {}};
  std::copy_n(simt::strides_of(128, 8, 128, c.layout).begin(), 4, args.strides);
  simt::config().only_blocks = {static_cast<uint64_t>(kImages - 1)};
  upsample_softmax_cuda(args, 0, nullptr);
  simt::config().only_blocks.clear();
  const float* const end = out.as<float>() + kImages * 128 * 1024;
  SIMT_EXPECT(end[-1] == 1.0F / 128 && end[-128 * 1024] == 1.0F / 128 && end[-128 * 1024 - 1] == 0);
}

void count_softmax(Layout layout, const char* shape) {
  HeadCase c = simt::kCounted;
  c.layout = layout;
  simt::Logits<float> logits(c);
  simt::Array<float> got(1, c.classes, c.out_height, c.out_width, layout, "probabilities");
  pydense::UpsampleSoftmaxCudaArgs<float> args = {
      logits.view(), simt::axes_of<float>(c), got.data(), {}};
  std::copy_n(got.strides().begin(), 4, args.strides);
  const simt::Limits limits = simt::limits_of(
      "upsample_softmax_kernel", 4.0 * 19 * (8 * 64 + 32 * 256), shape, simt::kCountedScale);
  simt::counted(limits, [&] { upsample_softmax_cuda(args, 0, nullptr); });
}
void counters_of_softmax() {
  count_softmax(Layout::kContiguous, "1x19x256x512 to 1024x2048");
  count_softmax(Layout::kChannelsLast, "1x19x256x512 to 1024x2048, channels last");
}

void count_softmax_backward(Layout layout, const char* shape) {
  HeadCase c = simt::kCounted;
  c.layout = layout;
  simt::Logits<float> logits(c);
  simt::Array<float> upstream(1, c.classes, c.out_height, c.out_width, layout, "upstream");
  upstream.fill(9, 2);
  simt::Array<float> got(1, c.classes, c.height, c.width, layout, "gradient");
  const pydense::HeadAxes<float> axes = simt::axes_of<float>(c);
  const int64_t numbers = pydense::softmax_backward_parts(logits.view(), axes);
  simt::Buffer<float> parts(static_cast<size_t>(numbers), "parts");
  pydense::UpsampleSoftmaxBackwardCudaArgs<float> args = {
      logits.view(), axes, upstream.data(), {}, got.data(), layout == Layout::kChannelsLast,
      parts.data()};
  std::copy_n(upstream.strides().begin(), 4, args.strides);
  const auto part_bytes = 4.0 * static_cast<double>(numbers);
  const double low_bytes = 4.0 * 19 * 8 * 64;
  simt::Limits main =
      simt::limits_of("upsample_softmax_backward_kernel",
                      4.0 * 19 * 32 * 256 + low_bytes + part_bytes, shape, simt::kCountedScale);
  main.wavefronts = 1.7;
  main.reason = "columns that fall onto neighbours are a scale apart in shared memory";
  // Two parts at least for every logit.
  simt::Limits sum =
      simt::limits_of("softmax_backward_sum_kernel", 3 * low_bytes, shape, simt::kCountedScale);
  if (layout == Layout::kChannelsLast) {
    main.sectors = 6.6;
    main.reason = "threads lie along columns: other classes of a sector come from the L1 cache";
    sum.sectors = 3.9;
    sum.reason = "parts lie along columns: neighbours in a sector are for other threads of a block";
  }
  simt::counted({main, sum}, [&] { upsample_softmax_backward_cuda(args, 0, nullptr); });
}
void counters_of_softmax_backward() {
  count_softmax_backward(Layout::kContiguous, "1x19x256x512 from 1024x2048");
  count_softmax_backward(Layout::kChannelsLast, "1x19x256x512 from 1024x2048, channels last");
}

}  // namespace
