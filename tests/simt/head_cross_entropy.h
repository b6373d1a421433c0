// SPDX-License-Identifier: Apache-2.0
// A call of cross-entropy's CUDA kernels with all its arrays, held to the definition in double,
// pixel by pixel; for test_segmentation_head_cross_entropy.cpp.
#pragma once

#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>

#include "head_logits.h"
#include "segmentation_head/cross_entropy_cuda.h"

namespace {

using pydense::CrossEntropyCudaArgs;
using pydense::CrossEntropyDivisor;
using pydense::CrossEntropyPartial;
using pydense::CrossEntropyPlan;
using pydense::IntegerType;
using simt::HeadCase;
using simt::Layout;

using simt::kInfinity;
using simt::kIntegerType;
using simt::kNan;

struct Options {
  bool weight = false;
  bool pixel_weight = false;
  double smoothing = 0;
  bool per_pixel = false;
  bool gradient = true;
  bool count = true;
  CrossEntropyDivisor divisor = CrossEntropyDivisor::kOne;
  int64_t ignore = 100;
  double everything_ignored_before = 0;  // of the rows, this share
  int64_t enough_tiles = 2;              // so that tiles are of several rows, as large maps' are
};

// One call with all its arrays. S: the type of the logits, L: of the labels.
template <class S, class L>
struct Call {
  using T = pydense::Accumulate<S>;

  simt::Logits<S>& logits;
  const HeadCase& c;
  Options options;
  int64_t pixels;
  simt::Buffer<L> target;
  simt::Buffer<T> weight;
  simt::Buffer<T> pixel_weight;
  simt::Buffer<T> loss;
  simt::Array<T> gradient;
  simt::Buffer<T> total{1, "total"};
  simt::Buffer<double> scale{1, "scale"};
  simt::Buffer<int64_t> counts{2, "counts"};
  std::vector<int64_t> label_of_pixel;

  Call(simt::Logits<S>& from, const Options& with)
      : logits(from),
        c(from.size),
        options(with),
        pixels(c.images * c.out_height * c.out_width),
        target(static_cast<size_t>(pixels), "target"),
        weight(static_cast<size_t>(c.classes), "weight"),
        pixel_weight(static_cast<size_t>(2 * pixels), "pixel_weight"),
        loss(static_cast<size_t>(pixels), "loss"),
        gradient(c.images, c.classes, c.height, c.width,
                 c.layout == Layout::kChannelsLast ? c.layout : Layout::kContiguous, "gradient") {
    simt::fill(weight, 11, 0.5);
    for (T& w : weight) {
      w += 1;
    }
    simt::fill(pixel_weight, 12, 1);
    const std::vector<double> picks = simt::random_values(static_cast<size_t>(pixels), 13, 1);
    const auto in_image = static_cast<size_t>(c.out_height * c.out_width);
    for (size_t i = 0; i < picks.size(); ++i) {
      auto label = static_cast<int64_t>((picks[i] + 1) / 2 * static_cast<double>(c.classes));
      label = std::min(label, c.classes - 1);
      const double row = static_cast<double>(i % in_image / static_cast<size_t>(c.out_width));
      const bool ignored =
          i % 7 == 3 || row < options.everything_ignored_before * static_cast<double>(c.out_height);
      target[i] = static_cast<L>(ignored ? options.ignore : label);
      if (i % 5 == 1) {
        pixel_weight[2 * i] = 0;
      }
    }
  }

  void run() {
    const pydense::HeadAxes<T> axes = simt::axes_of<T>(c);
    CrossEntropyCudaArgs<T> args{};
    args.logits = logits.view();
    args.axes = axes;
    args.target = target.data();
    args.target_type = kIntegerType<L>;
    args.target_strides[0] = c.out_height * c.out_width;
    args.target_strides[1] = c.out_width;
    args.target_strides[2] = 1;
    args.ignore_index = options.ignore;
    args.weight = options.weight ? weight.data() : nullptr;
    args.pixel_weight = options.pixel_weight ? pixel_weight.data() : nullptr;
    for (int axis = 0; axis < 3; ++axis) {
      args.pixel_weight_strides[axis] = 2 * args.target_strides[axis];
    }
    args.smoothing = options.smoothing;
    args.loss = options.per_pixel ? loss.data() : nullptr;
    args.gradient = options.gradient ? gradient.data() : nullptr;
    args.gradient_channels_last = c.layout == Layout::kChannelsLast;
    args.count_correct = options.count;
    args.divisor = options.divisor;
    args.total = options.per_pixel ? nullptr : total.data();
    args.scale = scale.data();
    args.counts = counts.data();
    const CrossEntropyPlan plan =
        plan_cross_entropy(args.logits, axes, options.gradient, options.enough_tiles);
    simt::Buffer<CrossEntropyPartial> partials(static_cast<size_t>(plan.blocks), "partials");
    simt::Buffer<T> halo(static_cast<size_t>(plan.halo_rows + plan.halo_columns), "halo");
    args.partials = partials.data();
    args.halo = halo.data();
    upsample_cross_entropy_cuda(args, plan, 0, nullptr);
  }

  // Of class k's -log p, its derivative by logit q is p_q - (q == k).
  void check(double relative, double absolute) {
    std::vector<double> expected_loss(static_cast<size_t>(pixels));
    std::vector<double> slopes(static_cast<size_t>(c.images * c.classes * c.height * c.width));
    double sum = 0;
    double weights = 0;
    int64_t correct = 0;
    int64_t valid = 0;
    size_t i = 0;
    const pydense::HeadAxes<T> axes = simt::axes_of<T>(c);
    const double classes = static_cast<double>(c.classes);
    simt::for_each_output(c, [&](int64_t n, int64_t y, int64_t x) {
      const size_t at = i++;
      const auto label = static_cast<int64_t>(target[at]);
      expected_loss[at] = 0;
      if (label == options.ignore) {
        return;
      }
      const bool known = label >= 0 && label < c.classes;
      const std::vector<double> values = logits.upsampled(n, y, x);
      const double most = *std::max_element(values.begin(), values.end());
      double powers = 0;
      for (const double value : values) {
        powers += std::exp(value - most);
      }
      const double a = options.pixel_weight ? static_cast<double>(pixel_weight[2 * at]) : 1;
      const auto weight_of = [&](int64_t k) {
        return options.weight ? static_cast<double>(weight[static_cast<size_t>(k)]) : 1.0;
      };
      const double hit = known ? (1 - options.smoothing) * a * weight_of(label) : kNan;
      std::vector<double> factors(values.size());  // before -log p of each class
      for (int64_t k = 0; k < c.classes; ++k) {
        factors[static_cast<size_t>(k)] =
            options.smoothing / classes * a * weight_of(k) + (k == label ? hit : 0);
      }
      if (!known) {
        factors[0] = kNan;
      }
      double all = 0;
      double value = 0;
      for (size_t k = 0; k < values.size(); ++k) {
        all += factors[k];
        value += factors[k] == 0 ? 0 : factors[k] * (most - values[k] + std::log(powers));
      }
      expected_loss[at] = value;
      sum += value;
      weights += known ? a * weight_of(label) : 0;
      ++valid;
      // The largest as the kernels' arithmetic has it: ties are equal there, too.
      correct += known && values[static_cast<size_t>(label)] == most ? 1 : 0;
      const auto row = pydense::portable::axis_taps(axes.y, y);
      const auto column = pydense::portable::axis_taps(axes.x, x);
      for (int64_t k = 0; k < c.classes; ++k) {
        const double slope = all == 0
                                 ? -factors[static_cast<size_t>(k)]
                                 : all * std::exp(values[static_cast<size_t>(k)] - most) / powers -
                                       factors[static_cast<size_t>(k)];
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t h = corner < 2 ? row.i0 : row.i1;
          const int64_t w = corner % 2 == 0 ? column.i0 : column.i1;
          const double share = static_cast<double>(corner < 2 ? row.w0 : row.w1) *
                               static_cast<double>(corner % 2 == 0 ? column.w0 : column.w1);
          slopes[static_cast<size_t>(((n * c.classes + k) * c.height + h) * c.width + w)] +=
              share * slope;
        }
      }
    });
    if (options.per_pixel) {
      simt::expect_close(loss, expected_loss, relative, absolute);
    }
    const double by = options.divisor == CrossEntropyDivisor::kWeight ? weights
                      : options.divisor == CrossEntropyDivisor::kPixels
                          ? static_cast<double>(pixels)
                          : 1;
    if (!options.per_pixel) {
      near(static_cast<double>(total[0]), sum / by, relative,
           absolute * static_cast<double>(pixels) / std::abs(by == 0 ? 1 : by));
    }
    near(scale[0], by == 0 ? 0 : 1 / by, relative, 0);
    SIMT_EXPECT(counts[1] == valid);
    if (options.count) {
      SIMT_EXPECT(counts[0] == correct);
    }
    if (options.gradient) {
      const double reach =
          static_cast<double>(pixels) / static_cast<double>(c.images * c.height * c.width);
      size_t at = 0;
      for (int64_t n = 0; n < c.images; ++n) {
        for (int64_t k = 0; k < c.classes; ++k) {
          for (int64_t h = 0; h < c.height; ++h) {
            for (int64_t w = 0; w < c.width; ++w) {
              simt::expect_close_at(__FILE__, __LINE__, gradient.value(n, k, h, w), slopes[at],
                                    relative, absolute * std::max(reach, 1.0), at);
              ++at;
            }
          }
        }
      }
    }
  }

  static void near(double got, double expected, double relative, double absolute,
                   int line = __builtin_LINE()) {
    simt::expect_close_at(__FILE__, line, got, expected, relative, absolute, 0);
  }
};

template <class S>
constexpr double kError = sizeof(S) == 8 ? 1e-12 : 4e-6;

template <class S, class L>
void check(const HeadCase& c, const Options& options, double scale = 4) {
  simt::Logits<S> logits(c, scale);
  Call<S, L> call(logits, options);
  call.run();
  call.check(kError<S>, kError<S>);
}

}  // namespace
