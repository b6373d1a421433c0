// SPDX-License-Identifier: Apache-2.0
// The pixels of a picture as rows of the product's operand: their channels side by side. Contiguous
// pictures are transposed once. Pixels of channels_last pictures are copied when they are read, a
// run at a time: where they lie, a power of 2 apart, they would meet in few sets of the cache.
#pragma once

#include "atrous_conv/dense.h"
#include "common/buffer.h"
#include "common/gemm/gemm.h"
#include "common/simd_lanes.h"

namespace pydense::PYDENSE_ISA {

// Elements from a row of `count` numbers to the next: whole lines of the cache, an odd number.
template <class P>
int64_t row_pitch(int64_t count) {
  constexpr auto kLine = static_cast<int64_t>(64 / sizeof(P));
  return (ceil_div(count, kLine) | 1) * kLine;
}

template <class S>
class PictureRows {
 public:
  using P = GemmOperandOf<S>;
  using T = ComputeOf<S>;

  // `rows`: what lay_out made, or null.
  PictureRows(const DenseConvShape& shape, const DenseConvPicture& x, const void* rows)
      : shape_(shape),
        x_(x),
        pitch_(row_pitch<P>(gemm_depth<P>(shape.channels))),
        rows_(static_cast<const P*>(rows)) {}

  // Of all rows; 0 where pixels are read where they are.
  int64_t bytes() const {
    return x_.channels_last()
               ? 0
               : static_cast<int64_t>(checked_bytes(
                     static_cast<size_t>(shape_.batches * shape_.height * shape_.width),
                     static_cast<size_t>(pitch_) * sizeof(P)));
  }

  // Before pixels are read.
  void prepare(ParallelFor parallel_for) {
    if (x_.channels_last() || rows_ != nullptr) {
      return;
    }
    memory_ = Buffer(static_cast<size_t>(bytes()));
    lay_out(memory_.template as<P>(), parallel_for);
    rows_ = memory_.template as<P>();
  }

  void lay_out(P* to, ParallelFor parallel_for) const {
    const bool dense = x_.row == shape_.width;
    const int64_t rows = dense ? 1 : shape_.height;
    const int64_t width = dense ? shape_.height * shape_.width : shape_.width;
    const int64_t pieces = ceil_div(width, kPiece);
    parallel_tasks(parallel_for, shape_.batches * rows * pieces, [&](int64_t task) {
      const int64_t row = task / pieces % rows;
      const int64_t image = task / pieces / rows;
      const int64_t first = task % pieces * kPiece;
      transpose(static_cast<const S*>(x_.data) + image * x_.batch + row * x_.row + first,
                smaller(kPiece, width - first),
                to + ((image * rows + row) * width + first) * pitch_);
    });
  }

  // Room that `read` needs.
  int64_t room(int64_t depth) const {
    return x_.channels_last() ? kGemmRows * row_pitch<P>(depth) : 0;
  }

  struct Rows {
    const P* first;
    int64_t pitch;
  };
  // `depth` channels from `channel` on of `count` pixels that lie side by side, or below each
  // other.
  Rows read(int64_t image, int64_t y, int64_t x, int64_t count, bool vertical, int64_t channel,
            int64_t depth, P* room) const {
    if (!x_.channels_last()) {
      return {rows_ + ((image * shape_.height + y) * shape_.width + x) * pitch_ + channel,
              vertical ? shape_.width * pitch_ : pitch_};
    }
    const int64_t pitch = row_pitch<P>(depth);
    const S* from = pixel_at(image, y, x) + channel;
    for (int64_t i = 0; i < count; ++i, from += vertical ? x_.row : x_.pixel) {
      copy(from, smaller(depth, shape_.channels - channel), depth, room + i * pitch);
    }
    return {room, pitch};
  }

 private:
  static constexpr int64_t kPiece = 64;  // pixels of a task
  static constexpr int kLanes = kNativeLanesOf<T>;
  static constexpr int64_t kStep = kGemmStep<P>;
  using V = Vec<T, kLanes>;

  const S* pixel_at(int64_t image, int64_t y, int64_t x) const {
    return static_cast<const S*>(x_.data) + image * x_.batch + y * x_.row + x * x_.pixel;
  }

  static void copy(const S* from, int64_t count, int64_t depth, P* to) {
    if constexpr (std::is_same_v<S, P>) {
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(S));
    } else {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        store(to + i, load_as<V>(from + i));
      }
      for (; i < count; ++i) {
        to[i] = load_as<T>(from + i);
      }
    }
    for (int64_t i = count; i < depth; ++i) {
      to[i] = P{};
    }
  }

  // Squares of channels, or pairs of them, and pixels. The room behind a pixel's channels takes
  // what a square has more of them.
  void transpose(const S* from, int64_t pixels, P* to) const {
    for (int64_t c = 0; c < shape_.channels; c += kLanes * kStep) {
      for (int64_t i = 0; i < pixels; i += kLanes) {
        const int64_t count = smaller(kLanes, pixels - i);
        square(from + c * x_.channel + i, smaller(kLanes * kStep, shape_.channels - c), count,
               to + i * pitch_ + c);
      }
    }
  }

  void square(const S* from, int64_t channels, int64_t pixels, P* to) const {
    using Steps = Vec<GemmLane<P>, kLanes>;
    Steps lanes[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      lanes[k] = steps_of(from + k * kStep * x_.channel, channels - k * kStep, pixels);
    }
    transpose_square(lanes);
    for (int64_t i = 0; i < pixels; ++i) {
      store(to + i * pitch_, lanes[i]);
    }
  }

  // A channel of some pixels, or a pair of channels of each.
  auto steps_of(const S* from, int64_t channels, int64_t pixels) const {
    if constexpr (kStep == 2) {
      using Pixels = Vec<uint16_t, kLanes>;
      using Steps = Vec<uint32_t, kLanes>;
      const auto row = [&](int64_t channel) {
        if (channel >= channels) {
          return Pixels{};
        }
        if (pixels == kLanes) {
          return load<Pixels>(from + channel * x_.channel);
        }
        Pixels part = {};
        std::memcpy(&part, from + channel * x_.channel, static_cast<size_t>(pixels) * sizeof(S));
        return part;
      };
      return __builtin_convertvector(row(0), Steps) |
             (__builtin_convertvector(row(1), Steps) << 16);
    } else {
      if (channels <= 0) {
        return V{};
      }
      return pixels == kLanes ? load_as<V>(from) : load_part<V>(from, pixels);
    }
  }

  const DenseConvShape& shape_;
  DenseConvPicture x_;
  int64_t pitch_;
  const P* rows_;
  Buffer memory_;
};

}  // namespace pydense::PYDENSE_ISA
