// SPDX-License-Identifier: Apache-2.0
// What the depthwise kernels read. Rows of contiguous pictures are converted once, with room behind
// each for a vector to read on; of channels_last pictures, pixels are read where they lie.
#pragma once

#include "atrous_conv/depthwise.h"
#include "common/buffer.h"
#include "common/partial.h"

namespace pydense::PYDENSE_ISA {

template <class T>
using RowVec = Vec<T, kNativeLanesOf<T>>;

template <class S, class T>
PYDENSE_HD void convert_row(const S* from, int64_t count, T* to) {
  using V = RowVec<T>;
  constexpr int64_t kLanes = kLanesIn<V>;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(to + i, load_as<V>(from + i));
  }
  for (; i < count; ++i) {
    to[i] = load_as<T>(from + i);
  }
}

// The rows that a row of the output reads, in a ring that is as high as the dilated kernel.
template <class S>
class RowRing {
 public:
  using T = ComputeOf<S>;

  explicit RowRing(const DepthwiseShape& shape)
      : shape_(shape),
        // (kernel - 1) * dilation may be far larger than the picture.
        rows_(smaller(shape.height, (shape.kernel_height - 1) * shape.dilation_y + 1)),
        stride_(shape.width + kLanesIn<RowVec<T>>),
        memory_(
            buffer_of<T>(checked_bytes(static_cast<size_t>(rows_), static_cast<size_t>(stride_)))) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t x = shape.width; x < stride_; ++x) {
        memory_.template as<T>()[i * stride_ + x] = T{};
      }
    }
  }

  // Rows of this plane from now on, for outputs from row y on.
  void start(const S* plane, int64_t row, int64_t y) {
    plane_ = plane;
    row_ = row;
    next_ = larger(0, y - shape_.top);
  }

  // Makes the rows for outputs in row y ready. y goes up by one from call to call.
  void advance(int64_t y) {
    const int64_t end =
        smaller(shape_.height, y - shape_.top + (shape_.kernel_height - 1) * shape_.dilation_y + 1);
    for (; next_ < end; ++next_) {
      convert_row(plane_ + next_ * row_, shape_.width, at(next_));
    }
  }

  // Row i of the kernel, or null where it lies beside the picture.
  const T* read(int64_t y, int64_t i) const {
    const int64_t from = y + i * shape_.dilation_y - shape_.top;
    return from >= 0 && from < shape_.height ? at(from) : nullptr;
  }

 private:
  T* at(int64_t row) const { return memory_.template as<T>() + row % rows_ * stride_; }

  const DepthwiseShape& shape_;
  int64_t rows_;
  int64_t stride_;
  Buffer memory_;
  const S* plane_ = nullptr;
  int64_t row_ = 0;
  int64_t next_ = 0;
};

// A tap of the kernel over a channels_last picture: the pixel of x that it meets, and its weights,
// or the sums that become their gradient, all channels of each.
template <class S, class W>
struct PixelTap {
  const S* x;
  W* weight;
};

// The taps that the outputs (y, x) and following of a segment read; returns how many. `row` is the
// stride of `image`, weight is [taps, channels].
template <class S, class W>
int64_t taps_at(const DepthwiseShape& shape, const TapSegment& segment, int64_t y, int64_t x,
                const S* image, int64_t row, W* weight, PixelTap<S, W>* taps) {
  int64_t count = 0;
  for (int64_t i = 0; i < shape.kernel_height; ++i) {
    const int64_t from = y + i * shape.dilation_y - shape.top;
    if (from < 0 || from >= shape.height) {
      continue;
    }
    for (int64_t j = segment.first; j < segment.last; ++j) {
      taps[count++] = {
          image + from * row + (x + j * shape.dilation_x - shape.left) * shape.channels,
          weight + (i * shape.kernel_width + j) * shape.channels};
    }
  }
  return count;
}

}  // namespace pydense::PYDENSE_ISA
