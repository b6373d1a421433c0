// SPDX-License-Identifier: Apache-2.0
// The operands of a weight's gradient: pixels are the depth of the product. Of the output's
// gradient, a row of the operand holds the pixels of a channel; of x, panels of channels hold pixel
// after pixel. Both hold the same columns of a picture, so that the pixels of several rows of it
// are one piece of depth for every tap that makes these columns meet.
#pragma once

#include "atrous_conv/dense_gradient.h"
#include "atrous_conv/dense_picture.h"
#include "common/gemm/gemm_panels.h"

namespace pydense::PYDENSE_ISA {

// Columns [first, first + count) of all rows of a picture. In the operand a row of them has `row`
// pixels, whole steps, with zeros behind the last one.
struct PixelColumns {
  int64_t first;
  int64_t count;
  int64_t row;
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

  // Numbers of a channel: `around` zeros, its pixels, and as many zeros again or more.
  static int64_t pitch(const PixelColumns& pixels, int64_t around) {
    return row_pitch<P>(2 * around + pixels.height * pixels.row + kVector);
  }

  // [channel][row][pixel], a pitch from a channel to the next. `channels` from `channel` on;
  // `image` is the picture's first pixel.
  static void take_rows(const DenseConvPicture& from, const S* image, const PixelColumns& pixels,
                        int64_t around, int64_t channel, int64_t channels, P* to) {
    const int64_t own = pitch(pixels, around);
    for (int64_t y = 0; y < pixels.height; ++y) {
      const S* const row = image + y * from.row + pixels.first * from.pixel;
      P* const place = to + around + y * pixels.row;
      // The last vector of a row may reach into the next one, which comes later.
      for (int64_t i = 0; i < pixels.row; i += kVector) {
        const int64_t count = pixels.count - i;
        for (int64_t c = channel; c < channel + channels; c += kLanes) {
          const int64_t part = smaller(kLanes, channel + channels - c);
          if (!from.channels_last()) {
            for (int64_t k = c; k < c + part; ++k) {
              store(place + k * own + i, gemm_steps<P>(row + k * from.channel + i, count));
            }
            continue;
          }
          Steps square[kLanes];
          for (int64_t k = 0; k < kLanes; ++k) {
            square[k] = k * kStep < count ? channels_of(row + (i + k * kStep) * from.pixel + c,
                                                        from.pixel, count - k * kStep > 1, part)
                                          : Steps{};
          }
          transpose_square(square);
          for (int64_t k = 0; k < part; ++k) {
            store(place + (c + k) * own + i, square[k]);
          }
        }
      }
    }
    const int64_t end = around + pixels.height * pixels.row;
    for (int64_t c = channel; c < channel + channels; ++c) {
      zero(to + c * own, around);
      zero(to + c * own + end, own - end);
    }
  }

  // Rows [y, end) of a panel: [row][step of pixels][kColumns channels], zeros behind the last
  // channel.
  static void take_panel(const DenseConvPicture& from, const S* image, const PixelColumns& pixels,
                         int64_t y, int64_t end, int64_t channel, int64_t channels, Step* to) {
    for (; y < end; ++y) {
      const S* const row = image + y * from.row + pixels.first * from.pixel;
      Step* const place = to + y * pixels.row / kStep * kColumns;
      for (int64_t half = 0; half < kColumns; half += kLanes) {
        const int64_t first = channel + half;
        const int64_t part = smaller(kLanes, channel + channels - first);
        if (from.channels_last()) {
          for (int64_t i = 0; i < pixels.row; i += kStep) {
            store(place + i / kStep * kColumns + half,
                  part <= 0 || i >= pixels.count
                      ? Steps{}
                      : channels_of(row + i * from.pixel + first, from.pixel, pixels.count - i > 1,
                                    part));
          }
          continue;
        }
        for (int64_t i = 0; i < pixels.row; i += kVector) {
          const int64_t count = pixels.count - i;
          Steps square[kLanes];
          for (int64_t c = 0; c < kLanes; ++c) {
            square[c] =
                c < part ? gemm_steps<P>(row + (first + c) * from.channel + i, count) : Steps{};
          }
          transpose_square(square);
          for (int64_t k = 0; k < smaller(kLanes, (pixels.row - i) / kStep); ++k) {
            store(place + (i / kStep + k) * kColumns + half, square[k]);
          }
        }
      }
    }
  }

 private:
  using V = Vec<T, kLanes>;

  static void zero(P* to, int64_t count) {
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(P));
  }

  // A step of each of some channels of a pixel; pairs: with the one `next` elements on, or 0. An
  // expanded map has all pixels in one place: `next` may be 0 where there is a second pixel.
  static Steps channels_of(const S* from, int64_t next, bool has_next, int64_t channels) {
    if constexpr (kStep == 2) {
      using Pixels = Vec<uint16_t, kLanes>;
      const auto pixel = [&](const S* own) {
        if (channels == kLanes) {
          return load<Pixels>(own);
        }
        Pixels part = {};
        std::memcpy(&part, own, static_cast<size_t>(channels) * sizeof(S));
        return part;
      };
      const Steps low = __builtin_convertvector(pixel(from), Steps);
      return has_next ? low | (__builtin_convertvector(pixel(from + next), Steps) << 16) : low;
    } else {
      return channels == kLanes ? load_as<V>(from) : load_part<V>(from, channels);
    }
  }
};

}  // namespace pydense::PYDENSE_ISA
