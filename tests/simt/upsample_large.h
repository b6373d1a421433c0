// SPDX-License-Identifier: Apache-2.0
// Upsampling past 2^31 elements, planes and channels: on memory that is not there, by the block of
// the last ones alone.
#pragma once

#include "upsample_checks.h"

namespace upsample_checks {

inline void large_elements() {
  constexpr int64_t kSide = 64;
  constexpr int64_t kPlanes = (int64_t{1} << 31) / (kSide * kSide) + 5;
  constexpr uint64_t kGroups = 8192;       // the launchers' largest grid here
  constexpr uint64_t kPlanesOfAGroup = 8;  // backward
  simt::SparseMemory wide(kPlanes * kSide * kSide * sizeof(__half));
  simt::SparseMemory narrow(kPlanes * 16 * sizeof(__half));
  __half* const outputs = wide.as<__half>();
  __half* const last_output = outputs + (kPlanes - 1) * kSide * kSide;
  __half* const inputs = narrow.as<__half>();
  __half* const last_input = inputs + (kPlanes - 1) * 16;
  const pydense::UpsampleShape shape = {1, kPlanes, kSide, kSide, false};
  const AxisSpec axis4 = axis({{4, 4}}, 4, kSide);
  const UpsampleInput input = {inputs, {kPlanes * 16, 16, 4}, axis4, axis4, false};
  std::fill(last_input, last_input + 16, pydense::from_float<__half>(1));
  simt::config().only_blocks = {uint64_t{kPlanes - 1} % kGroups};
  pydense::upsample_forward_cuda(kOp, FloatType::kFloat16, {shape, &input, 1, outputs, false}, 0,
                                 nullptr);
  for (int64_t i = 0; i < kSide * kSide; ++i) {
    SIMT_EXPECT(pydense::to_float(last_output[i]) == 1);
  }
  std::fill(last_input, last_input + 16, pydense::from_float<__half>(0));
  simt::config().only_blocks = {uint64_t{kPlanes - 1} / kPlanesOfAGroup % kGroups};
  pydense::upsample_backward_cuda(
      kOp, FloatType::kFloat16,
      {shape, outputs, {kPlanes * kSide * kSide, kSide * kSide, kSide}, nullptr, &input, 1}, 0,
      nullptr);
  simt::config().only_blocks.clear();
  double total = 0;
  for (int i = 0; i < 16; ++i) {
    total += value(last_input[i]);
  }
  SIMT_EXPECT(std::fabs(total - kSide * kSide) <= 2);
}

// The numbers of the block that has the last plane, or the last channels of the last column.
struct LargeBlocks {
  uint64_t forward;
  uint64_t mask;
  uint64_t backward;
};

// 1 x 1 to 1 x 2, forward; 1 x 2 to 1 x 2, through the mask; 1 x 2 to 1 x 1, backward.
inline void check_large(int64_t batches, int64_t channels, bool last, const LargeBlocks& blocks,
                        bool with_backward) {
  const int64_t total = batches * channels;
  simt::SparseMemory wide(static_cast<size_t>(2 * total) * sizeof(__half));
  simt::SparseMemory masked(static_cast<size_t>(2 * total) * sizeof(__half));
  simt::SparseMemory narrow(static_cast<size_t>(total) * sizeof(__half));
  const pydense::UpsampleShape shape = {batches, channels, 1, 2, last};
  const auto picture = [&](__half* data, int64_t width, bool same) {
    const PictureStrides strides = {channels * width, last ? 1 : width,
                                    last ? channels * width : width};
    return UpsampleInput{data, strides, axis({{1, 1}}, 1, 1), axis({{1, 1}}, 1, 2), same};
  };
  // The last plane, or the last channels of it.
  const int64_t count = last ? std::min<int64_t>(channels, 8) : 1;
  const auto set = [&](__half* past, double number) {
    std::fill(past - count, past, pydense::from_float<__half>(static_cast<float>(number)));
  };
  const auto expect = [&](const __half* past, double number) {
    for (int64_t i = 1; i <= count; ++i) {
      SIMT_EXPECT(value(past[-i]) == number);
    }
  };
  __half* const end = narrow.as<__half>() + total;
  __half* const right = wide.as<__half>() + 2 * total;
  __half* const left = right - (last ? channels : 1);
  const UpsampleInput input = picture(narrow.as<__half>(), 1, false);
  set(end, 1);
  simt::config().only_blocks = {blocks.forward};
  pydense::upsample_forward_cuda(kOp, FloatType::kFloat16,
                                 {shape, &input, 1, wide.as<__half>(), false}, 0, nullptr);
  expect(right, 1);

  set(left, 3);
  right[-1] = pydense::from_float<__half>(-1);
  const PictureStrides strides = picture(nullptr, 2, true).strides;
  const UpsampleInput same = picture(masked.as<__half>(), 2, true);
  simt::config().only_blocks = {blocks.mask};
  pydense::upsample_backward_cuda(kOp, FloatType::kFloat16,
                                  {shape, wide.as<__half>(), strides, wide.as<__half>(), &same, 1},
                                  0, nullptr);
  SIMT_EXPECT(value(masked.as<__half>()[2 * total - 1]) == 0);
  SIMT_EXPECT(value(masked.as<__half>()[2 * total - 2]) == (count == 1 ? 3 : 1));

  if (with_backward) {
    simt::config().only_blocks = {blocks.backward};
    pydense::upsample_backward_cuda(
        kOp, FloatType::kFloat16, {shape, wide.as<__half>(), strides, wide.as<__half>(), &input, 1},
        0, nullptr);
    SIMT_EXPECT(value(end[-1]) == 3);  // of two outputs the one that is not masked
    end[-1] = pydense::from_float<__half>(4);
    expect(end, 4);
  }
  simt::config().only_blocks.clear();
}

inline void large_planes() {
  constexpr int64_t kPlanes = (int64_t{1} << 31) + 5;
  constexpr uint64_t kRows = 65535;  // of the mask's grid
  if (simt::config().order != simt::Order::kForward) {
    return;  // a block has tens of thousands of planes
  }
  const LargeBlocks blocks = {0, uint64_t{kPlanes - 1} % kRows, 0};
  check_large(kPlanes, 1, true, blocks, false);
  check_large(kPlanes, 1, false, blocks, simt::this_build() == simt::kRelease);
  check_large(1, kPlanes, false, blocks, false);
}

// Elements of the row in a block: 128 forward, 1024 masked; backward 32 channels.
inline void large_channels() {
  constexpr int64_t kChannels = (int64_t{1} << 31) + 8;
  check_large(1, kChannels, true,
              {uint64_t{2 * kChannels - 1} / 128, uint64_t{2 * kChannels - 1} / 1024,
               uint64_t{kChannels - 1} / 32},
              true);
}

// 2^31 - 1 tiles of a picture are a grid, one more is none.
inline void refuses_tiles() {
  simt::Buffer<__half> memory(4096, "memory");
  std::fill(memory.begin(), memory.end(), pydense::from_float<__half>(1));
  __half* const to = memory.data() + 2048;
  const auto refused = [&](int64_t channels, bool forward, bool same) {
    const pydense::UpsampleShape shape = {1, channels, 1, 1, true};
    const PictureStrides strides = {channels, 1, channels};
    const AxisSpec one = axis({{1, 1}}, 1, 1);
    const UpsampleInput input = {forward ? memory.data() : to, strides, one, one, same};
    try {
      if (forward) {
        pydense::upsample_forward_cuda(kOp, FloatType::kFloat16, {shape, &input, 1, to, false}, 0,
                                       nullptr);
      } else {
        pydense::upsample_backward_cuda(kOp, FloatType::kFloat16,
                                        {shape, memory.data(), strides, nullptr, &input, 1}, 0,
                                        nullptr);
      }
    } catch (const std::invalid_argument& error) {
      SIMT_EXPECT(std::strstr(error.what(), "2^31 tiles") != nullptr);
      return true;
    }
    return false;
  };
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  simt::config().only_blocks = {0};
  for (const int64_t more : {0, 1}) {
    SIMT_EXPECT(refused(kMost * 128 + more, true, false) == (more == 1));
    SIMT_EXPECT(refused(kMost * 32 + more, false, false) == (more == 1));
    SIMT_EXPECT(refused(kMost * 1024 + more, false, true) == (more == 1));
  }
  simt::config().only_blocks.clear();
}

}  // namespace upsample_checks
