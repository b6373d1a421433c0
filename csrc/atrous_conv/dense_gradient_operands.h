// SPDX-License-Identifier: Apache-2.0
// The operands of a weight's gradient: pixels are the depth of the product. Of the output's
// gradient, a row of the operand holds the pixels of a channel; of x, panels of channels hold pixel
// after pixel. Both hold the columns that a column of taps makes meet, so that the pixels of
// several rows of the picture are one piece of depth for every tap of that column.
#pragma once

#include "atrous_conv/dense_gradient.h"
#include "atrous_conv/dense_picture.h"
#include "common/gemm/gemm_panels.h"

namespace pydense::PYDENSE_ISA {

// Columns [first, first + count) of all rows of a picture.
struct PixelColumns {
  int64_t first;
  int64_t count;
  int64_t height;
};

template <class S>
class GradientOperands {
 public:
  using P = GemmOperandOf<S>;
  using T = ComputeOf<S>;
  static constexpr int64_t kStep = kGemmStep<P>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using Step = GemmLane<P>;
  using Steps = Vec<Step, kLanes>;
  static constexpr int64_t kVector = kLanes * kStep;  // pixels in a vector of steps

  static int64_t steps(int64_t pixels) { return ceil_div(pixels, kStep); }

  // [channel][row][step of pixels], pitch steps from a channel to the next. `channels` from
  // `channel` on; `image` is the picture's first pixel.
  static void take_rows(const DenseConvPicture& from, const S* image, const PixelColumns& pixels,
                        int64_t channel, int64_t channels, Step* to, int64_t pitch) {
    const int64_t own = steps(pixels.count);
    for (int64_t y = 0; y < pixels.height; ++y) {
      const S* const row = image + y * from.row + pixels.first * from.pixel;
      if (!from.channels_last()) {
        for (int64_t c = channel; c < channel + channels; ++c) {
          Step* const place = to + c * pitch + y * own;
          const S* const plane = row + c * from.channel;
          int64_t i = 0;
          for (; i + kVector <= pixels.count; i += kVector) {
            store(place + i / kStep, gemm_steps<P>(plane + i, kVector));
          }
          if (i < pixels.count) {
            Step part[kLanes];
            store(part, gemm_steps<P>(plane + i, pixels.count - i));
            std::memcpy(place + i / kStep, part,
                        static_cast<size_t>(steps(pixels.count - i)) * sizeof(Step));
          }
        }
        continue;
      }
      for (int64_t i = 0; i < pixels.count; i += kVector) {
        const int64_t count = smaller(kVector, pixels.count - i);
        for (int64_t c = channel; c < channel + channels; c += kLanes) {
          const int64_t part = smaller(kLanes, channel + channels - c);
          Steps square[kLanes];
          for (int64_t k = 0; k < kLanes; ++k) {
            square[k] = k * kStep < count ? channels_of(row + (i + k * kStep) * from.pixel + c,
                                                        from.pixel, count - k * kStep > 1, part)
                                          : Steps{};
          }
          transpose_square(square);
          for (int64_t k = 0; k < part; ++k) {
            Step lanes[kLanes];
            store(lanes, square[k]);
            std::memcpy(to + (c + k) * pitch + y * own + i / kStep, lanes,
                        static_cast<size_t>(steps(count)) * sizeof(Step));
          }
        }
      }
    }
  }

  // A panel: [row][step of pixels][kColumns channels], zeros behind the last channel.
  static void take_panel(const DenseConvPicture& from, const S* image, const PixelColumns& pixels,
                         int64_t channel, int64_t channels, Step* to) {
    const int64_t own = steps(pixels.count);
    for (int64_t y = 0; y < pixels.height; ++y) {
      const S* const row = image + y * from.row + pixels.first * from.pixel;
      Step* const place = to + y * own * kColumns;
      for (int64_t half = 0; half < kColumns; half += kLanes) {
        const int64_t first = channel + half;
        const int64_t part = smaller(kLanes, channel + channels - first);
        if (from.channels_last()) {
          for (int64_t i = 0; i < pixels.count; i += kStep) {
            store(place + i / kStep * kColumns + half,
                  part <= 0 ? Steps{}
                            : channels_of(row + i * from.pixel + first, from.pixel,
                                          pixels.count - i > 1, part));
          }
          continue;
        }
        for (int64_t i = 0; i < pixels.count; i += kVector) {
          const int64_t count = smaller(kVector, pixels.count - i);
          Steps square[kLanes];
          for (int64_t c = 0; c < kLanes; ++c) {
            square[c] =
                c < part ? gemm_steps<P>(row + (first + c) * from.channel + i, count) : Steps{};
          }
          transpose_square(square);
          for (int64_t k = 0; k < steps(count); ++k) {
            store(place + (i / kStep + k) * kColumns + half, square[k]);
          }
        }
      }
    }
  }

 private:
  using V = Vec<T, kLanes>;

  // A step of each of some channels of a pixel; pairs: with the one `next` elements on, or 0. An
  // expanded map has all pixels in one place: `next` may be 0 where there is a second pixel.
  static Steps channels_of(const S* from, int64_t next, bool has_next, int64_t channels) {
    if constexpr (kStep == 2) {
      using Pixels = Vec<uint16_t, kLanes>;
      const auto pixel = [&](const S* own) {
        Pixels part = {};
        std::memcpy(&part, own, static_cast<size_t>(channels) * sizeof(S));
        return channels == kLanes ? load<Pixels>(own) : part;
      };
      const Steps low = __builtin_convertvector(pixel(from), Steps);
      return has_next ? low | (__builtin_convertvector(pixel(from + next), Steps) << 16) : low;
    } else {
      return channels == kLanes ? load_as<V>(from) : load_part<V>(from, channels);
    }
  }
};

}  // namespace pydense::PYDENSE_ISA
