// SPDX-License-Identifier: Apache-2.0
// Cases of upsampled argmax for test_segmentation_head.cpp.
#pragma once

#include <limits>

#include "head_logits.h"
#include "segmentation_head/segmentation_head_cuda.h"

namespace {

using pydense::Accumulate;
using pydense::IntegerType;
using pydense::upsample_argmax_cuda;
using simt::HeadCase;
using simt::Layout;

using simt::kInfinity;
using simt::kIntegerType;
using simt::kNan;

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
  const auto refused = [](const HeadCase& c, IntegerType type, auto change) {
    simt::Logits<float> logits(c);
    pydense::UpsampleArgmaxCudaArgs<float> args = {logits.view(), simt::axes_of<float>(c), nullptr,
                                                   type, nullptr};
    change(args);
    try {
      upsample_argmax_cuda(args, 0, nullptr);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  const auto as_is = [](auto& /*args*/) {};
  const HeadCase none = {0, 256, 1, 1, 2, 2, false, Layout::kContiguous};
  HeadCase many = none;
  many.classes = 257;
  SIMT_EXPECT(!refused(none, IntegerType::kUInt8, as_is));
  SIMT_EXPECT(refused(many, IntegerType::kUInt8, as_is));
  SIMT_EXPECT(!refused(many, IntegerType::kInt32, as_is));
  SIMT_EXPECT(!refused(many, IntegerType::kInt64, as_is));
  SIMT_EXPECT(refused(none, IntegerType::kInt8, as_is));
  const auto in_64 = [&](auto change) { return refused(none, IntegerType::kInt64, change); };
  SIMT_EXPECT(in_64([](auto& args) { args.logits.classes = 0; }));
  SIMT_EXPECT(!in_64([](auto& args) { args.logits.classes = 1; }));
  SIMT_EXPECT(!in_64([](auto& args) { args.logits.classes = 0x7FFFFFFF; }));
  SIMT_EXPECT(in_64([](auto& args) { args.logits.classes = 0x80000000; }));
  SIMT_EXPECT(in_64([](auto& args) { args.logits.height = 2; }));
  SIMT_EXPECT(in_64([](auto& args) { args.logits.width = 2; }));
  SIMT_EXPECT(in_64([](auto& args) { args.logits.type = pydense::FloatType::kFloat64; }));
}

// More blocks than a grid has: block 0 takes the last image, too.
void argmax_of_many_images() {
  const simt::ManyImages many;
  simt::SparseMemory labels(static_cast<size_t>(many.size.images) * 12 * 4);
  simt::config().only_blocks = {0};
  upsample_argmax_cuda<float>({many.view, simt::axes_of<float>(many.size), labels.as<int32_t>(),
                               IntegerType::kInt32, nullptr},
                              0, nullptr);
  simt::config().only_blocks.clear();
  const int32_t* const end = labels.as<int32_t>() + many.size.images * 12;
  SIMT_EXPECT(end[-1] == 1 && end[-12] == 1 && end[-13] == 0);
}

void count_argmax(Layout layout, const char* shape, bool areas) {
  HeadCase c = simt::kCounted;
  c.layout = layout;
  simt::Logits<float> logits(c);
  for (int64_t y = 0; areas && y < c.height; ++y) {
    for (int64_t x = 0; x < c.width; ++x) {
      logits.set(0, x < 40 ? 7 : 11, y, x, 20);
    }
  }
  simt::Buffer<int64_t> got(32 * 256, "labels");
  const simt::Limits limits = simt::limits_of(
      "upsample_argmax_kernel", 4.0 * 19 * 8 * 64 + 8.0 * 32 * 256, shape, simt::kCountedScale);
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

}  // namespace
