// SPDX-License-Identifier: Apache-2.0
// Labels, softmax and sums of windows against plain loops in double.
#include <limits>

#include "head_logits.h"
#include "segmentation_head/segmentation_head_cuda.h"

namespace {

using pydense::Accumulate;
using pydense::IntegerType;
using pydense::upsample_argmax_cuda;
using simt::HeadCase;
using simt::Layout;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class U>
constexpr IntegerType kIntegerType = IntegerType::kInt64;
template <>
constexpr IntegerType kIntegerType<uint8_t> = IntegerType::kUInt8;
template <>
constexpr IntegerType kIntegerType<int32_t> = IntegerType::kInt32;

// One output: its largest class, the first of equals, a NaN above all.
struct Winner {
  int64_t label;
  double value;
};
Winner winner(const std::vector<double>& values) {
  Winner best = {0, values[0]};
  for (size_t c = 1; c < values.size() && best.value == best.value; ++c) {
    if (!(values[c] <= best.value)) {
      best = {static_cast<int64_t>(c), values[c]};
    }
  }
  return best;
}

template <class S, class U>
void labels(simt::Logits<S>& logits, bool with_confidence) {
  using T = Accumulate<S>;
  const HeadCase& c = logits.size;
  const auto outputs = static_cast<size_t>(c.images * c.out_height * c.out_width);
  simt::Buffer<U> got(outputs, "labels");
  simt::Buffer<T> confidence(with_confidence ? outputs : 0, "confidence");
  upsample_argmax_cuda<T>({logits.view(), simt::axes_of<T>(c), got.data(), kIntegerType<U>,
                           with_confidence ? confidence.data() : nullptr},
                          0, nullptr);
  const double rounding = sizeof(T) == 8 ? 1e-13 : 1e-5;
  size_t i = 0;
  simt::for_each_output(c, [&](int64_t n, int64_t y, int64_t x) {
    const std::vector<double> values = logits.upsampled(n, y, x);
    const Winner best = winner(values);
    const auto label = static_cast<int64_t>(got[i]);
    SIMT_EXPECT(label >= 0 && label < c.classes);
    const double found = values[static_cast<size_t>(std::clamp<int64_t>(label, 0, c.classes - 1))];
    // Not finite: no rounding decides. Else the label's value is the largest but for rounding.
    SIMT_EXPECT(label == best.label ||
                (std::isfinite(best.value) && found >= best.value - rounding));
    if (with_confidence) {
      double sum = 0;
      for (const double value : values) {
        sum += std::exp(value - best.value);
      }
      simt::expect_close_at(__FILE__, __LINE__, confidence[i], 1 / sum, 8 * rounding, 0, i);
    }
    ++i;
  });
}

// Scales from 1/3 to 14, whole and broken; several blocks along both axes; columns that skip
// logits; more classes than shared memory holds at a time.
template <class S, class U>
void argmax() {
  for (const HeadCase& c : {HeadCase{1, 1, 1, 1, 1, 1, false, Layout::kContiguous},
                            HeadCase{2, 3, 4, 5, 17, 23, false, Layout::kChannelsLast},
                            HeadCase{1, 21, 3, 11, 19, 141, true, Layout::kContiguous},
                            HeadCase{1, 5, 20, 30, 7, 11, false, Layout::kGaps},
                            HeadCase{1, 4, 3, 3, 3, 40, false, Layout::kContiguous}}) {
    simt::Logits<S> logits(c);
    labels<S, U>(logits, false);
    labels<S, U>(logits, true);
  }
}

template <class S>
void argmax_in_parts(Layout layout) {
  simt::Logits<S> skipping({1, 17, 3, 400, 3, 130, false, layout});
  labels<S, int32_t>(skipping, false);
  labels<S, int32_t>(skipping, true);
  simt::Logits<S> few({1, 450, 2, 8, 5, 100, false, layout});
  labels<S, int32_t>(few, false);
}

// Areas of one label, so that whole blocks, some warps, and no warp are spared; ties and values
// that are not finite among them.
void argmax_of_areas() {
  for (const double special : {0.0, kNan, kInfinity, -kInfinity}) {
    simt::Logits<float> logits({2, 6, 5, 40, 17, 157, false, Layout::kContiguous}, 0.25);
    for (int64_t n = 0; n < 2; ++n) {
      for (int64_t y = 0; y < 5; ++y) {
        for (int64_t x = 0; x < 40; ++x) {
          logits.set(n, n == 0 || x < 20 ? 3 : 1 + (x + y) % 4, y, x, 2);
        }
      }
    }
    for (int64_t x = 26; x < 33; ++x) {  // of two equals the first
      logits.set(0, 1, 3, x, 2);
      logits.set(0, 1, 4, x, 2);
    }
    if (special != 0) {
      logits.set(0, 5, 1, 3, special);
      logits.set(1, 0, 3, 9, special);
      logits.set(1, 4, 3, 9, kNan);
      logits.set(1, 3, 2, 36, special);
    }
    labels<float, uint8_t>(logits, false);
    labels<float, uint8_t>(logits, true);
  }
}

void argmax_of_ties() {
  simt::Logits<float> logits({1, 9, 4, 7, 13, 30, false, Layout::kChannelsLast}, 0);
  simt::Buffer<int64_t> got(13 * 30, "labels");
  for (const int64_t first : {0, 4}) {
    for (int64_t y = 0; y < 4; ++y) {
      for (int64_t x = 0; x < 7; ++x) {
        for (int64_t c = first; c < 9; ++c) {
          logits.set(0, c, y, x, 1.25);
        }
      }
    }
    for (const bool corners : {true, false}) {
      simt::Buffer<float> confidence(13 * 30, "confidence");
      upsample_argmax_cuda<float>({logits.view(), simt::axes_of<float>(logits.size), got.data(),
                                   IntegerType::kInt64, corners ? nullptr : confidence.data()},
                                  0, nullptr);
      SIMT_EXPECT(std::all_of(got.begin(), got.end(), [&](int64_t l) { return l == first; }));
    }
    logits.fill(1, 0);
  }
}

// Past 2^31 logits and labels: the last block alone.
void argmax_beyond_32_bits() {
  constexpr int64_t kImages = (int64_t{1} << 19) + 3;
  const HeadCase c = {kImages, 128, 4, 9, 8, 128, true, Layout::kContiguous};
  simt::SparseMemory memory(static_cast<size_t>(c.images * c.classes * 36 * 4));
  simt::SparseMemory labels(static_cast<size_t>(c.images * 8 * 128 * 8));
  pydense::LogitsView view = {
      memory.as<float>(), pydense::FloatType::kFloat32, c.images, c.classes, c.height, c.width, {}};
  std::copy_n(simt::strides_of(c.classes, c.height, c.width, c.layout).begin(), 4, view.strides);
  float* const last = memory.as<float>() + (kImages - 1) * view.strides[0];
  for (int64_t k = 0; k < 36; ++k) {
    last[77 * 36 + k] = 1;
  }
  simt::config().only_blocks = {static_cast<uint64_t>(kImages - 1)};
  upsample_argmax_cuda<float>(
      {view, simt::axes_of<float>(c), labels.as<int64_t>(), IntegerType::kInt64, nullptr}, 0,
      nullptr);
  simt::config().only_blocks.clear();
  const int64_t* const end = labels.as<int64_t>() + kImages * 8 * 128;
  SIMT_EXPECT(end[-1] == 77 && end[-8 * 128] == 77 && end[-8 * 128 - 1] == 0);
}

void argmax_refuses() {
  simt::Logits<float> logits({1, 300, 1, 1, 2, 2, false, Layout::kContiguous});
  simt::Buffer<uint8_t> got(4, "labels");
  bool refused = false;
  try {
    upsample_argmax_cuda<float>({logits.view(), simt::axes_of<float>(logits.size), got.data(),
                                 IntegerType::kUInt8, nullptr},
                                0, nullptr);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  SIMT_EXPECT(refused);
  simt::Logits<float> none({0, 3, 2, 2, 4, 4, false, Layout::kContiguous});
  upsample_argmax_cuda<float>(
      {none.view(), simt::axes_of<float>(none.size), nullptr, IntegerType::kInt64, nullptr}, 0,
      nullptr);
}

// A warp that brings logits into shared memory goes on at the next class in banks already in use.
simt::Limits limits_of(const char* kernel, double minimum_bytes, const char* shape, double scale) {
  simt::Limits limits{.kernel = kernel, .minimum_bytes = minimum_bytes};
  limits.wavefronts = 1.1;
  limits.reason = "bank conflicts where logits are brought in";
  limits.shape = shape;
  limits.scale = scale;
  return limits;
}

constexpr HeadCase kCounted = {1, 19, 8, 64, 32, 256, false, Layout::kContiguous};
constexpr double kCountedScale = 1024.0 * 2048.0 / (32.0 * 256.0);

void count_argmax(Layout layout, const char* shape, bool areas) {
  HeadCase c = kCounted;
  c.layout = layout;
  simt::Logits<float> logits(c);
  for (int64_t y = 0; areas && y < c.height; ++y) {
    for (int64_t x = 0; x < c.width; ++x) {
      logits.set(0, x < 40 ? 7 : 11, y, x, 20);
    }
  }
  simt::Buffer<int64_t> got(32 * 256, "labels");
  const simt::Limits limits =
      limits_of("upsample_argmax_kernel", 4.0 * 19 * 8 * 64 + 8.0 * 32 * 256, shape, kCountedScale);
  simt::counted(limits, [&] {
    upsample_argmax_cuda<float>(
        {logits.view(), simt::axes_of<float>(c), got.data(), IntegerType::kInt64, nullptr}, 0,
        nullptr);
  });
}
void counters_of_argmax() {
  count_argmax(Layout::kContiguous, "1x19x256x512 to 1024x2048, noise", false);
  count_argmax(Layout::kChannelsLast, "1x19x256x512 to 1024x2048, noise, channels last", false);
  count_argmax(Layout::kContiguous, "1x19x256x512 to 1024x2048, areas", true);
}

// ---- softmax ----

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
}
// More classes than shared memory holds.
void softmax_backward_in_parts() {
  softmax_backward_of<float>({1, 210, 2, 24, 5, 130, false, Layout::kChannelsLast},
                             Layout::kContiguous);
}

// ---- the sum over sliding windows ----

template <class S>
void accumulate_into(const HeadCase& c, Layout layout) {
  using T = Accumulate<S>;
  constexpr int64_t kTop = 3;
  constexpr int64_t kLeft = 2;
  simt::Logits<S> logits(c);
  simt::Array<T> sum(c.images, c.classes, c.out_height + 5, c.out_width + 4, layout, "sum");
  simt::Array<T> before(c.images, c.classes, c.out_height + 5, c.out_width + 4, layout, "before");
  sum.fill(9, 2);
  before.fill(9, 2);
  simt::Array<T> weight(1, 1, c.out_height, c.out_width, Layout::kGaps, "weight");
  weight.fill(10, 1);
  pydense::UpsampleAccumulateCudaArgs<T> args = {logits.view(),
                                                 simt::axes_of<T>(c),
                                                 &sum.at(0, 0, kTop, kLeft),
                                                 {},
                                                 weight.data(),
                                                 {weight.strides()[2], weight.strides()[3]}};
  std::copy_n(sum.strides().begin(), 4, args.strides);
  upsample_accumulate_cuda(args, 0, nullptr);
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-5;
  HeadCase whole = c;
  whole.out_height += 5;
  whole.out_width += 4;
  size_t i = 0;
  simt::for_each_output(whole, [&](int64_t n, int64_t row, int64_t column) {
    const int64_t y = row - kTop;
    const int64_t x = column - kLeft;
    const bool inside = y >= 0 && y < c.out_height && x >= 0 && x < c.out_width;
    const std::vector<double> values =
        inside ? logits.upsampled(n, y, x)
               : std::vector<double>(static_cast<size_t>(c.classes), 0.0);
    for (int64_t k = 0; k < c.classes; ++k) {
      const double factor = inside ? weight.value(0, 0, y, x) : 0.0;
      simt::expect_close_at(
          __FILE__, __LINE__, sum.value(n, k, row, column),
          before.value(n, k, row, column) + factor * values[static_cast<size_t>(k)], tolerance,
          inside ? tolerance : 0, i++);
    }
  });
}

template <class S>
void accumulate() {
  for (const HeadCase& c : {HeadCase{2, 3, 4, 5, 17, 23, false, Layout::kChannelsLast},
                            HeadCase{1, 70, 3, 11, 9, 137, true, Layout::kContiguous},
                            HeadCase{1, 35, 3, 400, 2, 130, false, Layout::kContiguous}}) {
    for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast, Layout::kGaps}) {
      accumulate_into<S>(c, layout);
    }
  }
}

// ---- what they ask of memory ----

void count_softmax(Layout layout, const char* shape) {
  HeadCase c = kCounted;
  c.layout = layout;
  simt::Logits<float> logits(c);
  simt::Array<float> got(1, c.classes, c.out_height, c.out_width, layout, "probabilities");
  pydense::UpsampleSoftmaxCudaArgs<float> args = {
      logits.view(), simt::axes_of<float>(c), got.data(), {}};
  std::copy_n(got.strides().begin(), 4, args.strides);
  const simt::Limits limits =
      limits_of("upsample_softmax_kernel", 4.0 * 19 * (8 * 64 + 32 * 256), shape, kCountedScale);
  simt::counted(limits, [&] { upsample_softmax_cuda(args, 0, nullptr); });
}
void counters_of_softmax() {
  count_softmax(Layout::kContiguous, "1x19x256x512 to 1024x2048");
  count_softmax(Layout::kChannelsLast, "1x19x256x512 to 1024x2048, channels last");
}

void count_softmax_backward(Layout layout, const char* shape) {
  HeadCase c = kCounted;
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
  simt::Limits main = limits_of("upsample_softmax_backward_kernel",
                                4.0 * 19 * 32 * 256 + low_bytes + part_bytes, shape, kCountedScale);
  main.wavefronts = 1.7;
  main.reason = "columns that fall onto neighbours are a scale apart in shared memory";
  // Two parts at least for every logit.
  simt::Limits sum = limits_of("softmax_backward_sum_kernel", 3 * low_bytes, shape, kCountedScale);
  if (layout == Layout::kChannelsLast) {
    main.sectors = 6.3;
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

void count_accumulate(Layout layout, const char* shape) {
  HeadCase c = kCounted;
  c.layout = layout;
  simt::Logits<float> logits(c);
  simt::Array<float> sum(1, c.classes, c.out_height, c.out_width, layout, "sum");
  sum.fill(9, 2);
  simt::Buffer<float> weight(32 * 256, "weight");
  simt::fill(weight, 10);
  pydense::UpsampleAccumulateCudaArgs<float> args = {
      logits.view(), simt::axes_of<float>(c), sum.data(), {}, weight.data(), {256, 1}};
  std::copy_n(sum.strides().begin(), 4, args.strides);
  const simt::Limits limits =
      limits_of("upsample_accumulate_kernel", 4.0 * (19 * (8 * 64 + 2 * 32 * 256) + 32 * 256),
                shape, kCountedScale);
  simt::counted(limits, [&] { upsample_accumulate_cuda(args, 0, nullptr); });
}
void counters_of_accumulate() {
  count_accumulate(Layout::kContiguous, "1x19x256x512 to 1024x2048");
  count_accumulate(Layout::kChannelsLast, "1x19x256x512 to 1024x2048, channels last");
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(
      argc, argv,
      {
          {"argmax, float", argmax<float, int64_t>},
          {"argmax, double", argmax<double, int32_t>},
          {"argmax, half", argmax<__half, uint8_t>},
          {"argmax, bfloat16", argmax<__nv_bfloat16, int64_t>},
          {"argmax in parts", [] { argmax_in_parts<float>(Layout::kContiguous); }},
          {"argmax in parts, double", [] { argmax_in_parts<double>(Layout::kChannelsLast); }},
          {"argmax of areas", argmax_of_areas},
          {"argmax of ties", argmax_of_ties},
          {"argmax beyond 32 bits", argmax_beyond_32_bits, simt::kRelease | simt::kAsan},
          {"argmax refuses", argmax_refuses},
          {"softmax, float", softmax<float>},
          {"softmax, double", softmax<double>},
          {"softmax, half", softmax<__half>},
          {"softmax, bfloat16", softmax<__nv_bfloat16>},
          {"softmax of extremes", softmax_of_extremes},
          {"softmax backward, float", softmax_backward<float>},
          {"softmax backward, double", softmax_backward<double>},
          {"softmax backward, half", softmax_backward<__half>},
          {"softmax backward, bfloat16", softmax_backward<__nv_bfloat16>},
          {"softmax backward in parts", softmax_backward_in_parts},
          {"accumulate, float", accumulate<float>},
          {"accumulate, double", accumulate<double>},
          {"accumulate, half", accumulate<__half>},
          {"accumulate, bfloat16", accumulate<__nv_bfloat16>},
          {"counters, argmax", counters_of_argmax},
          {"counters, softmax", counters_of_softmax},
          {"counters, softmax backward", counters_of_softmax_backward},
          {"counters, accumulate", counters_of_accumulate},
      });
}
