// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of this room share. A block has kHeadColumns x kHeadRows outputs of one
// image, a thread a column of them. Outputs of a column between the same two rows of logits make a
// strip: the logits that the block's columns lie between in these two rows are brought into shared
// memory, whatever their type and layout, and serve all outputs they reach. Of the interpolation,
// the horizontal part is done once per strip and class.
#pragma once

#include <cstdint>

#include "common/cuda.cuh"
#include "common/with_constant.h"
#include "segmentation_head/segmentation_head.h"
#include "upsample/upsample_math.h"

namespace pydense {

constexpr int kHeadColumns = 128;  // also the threads of a block
constexpr int kHeadRows = 8;
constexpr int kStripRows = 4;  // that a thread computes at a time, in registers
// Columns of logits in shared memory: two for each thread where outputs skip some, else all from
// the first to the last, of which there are no more.
constexpr int kMostSlots = 2 * kHeadColumns;
template <class T>
constexpr int kTileValues = 32 * 1024 / static_cast<int>(sizeof(T));
// At a time on a multiprocessor, by shared memory; the registers must allow as many.
template <class T>
constexpr int kHeadBlocks = sizeof(T) == sizeof(double) ? 3 : 5;

template <class T>
struct HeadShared {
  T values[kTileValues<T>];
  // Of each column: where it lies between logits.
  T column_weights[2][kHeadColumns];
  int column_taps[2][kHeadColumns];
  T row_weights[2][kHeadRows];
  int row_taps[2][kHeadRows];
  int columns[kMostSlots];  // of slots, where outputs skip some
};

// Outputs of one image, at most kHeadRows x kHeadColumns.
struct HeadOutputs {
  int64_t image;
  int64_t first_row;
  int64_t first_column;
  int rows;
  int columns;
};

struct HeadStrip {
  int row;   // of the block
  int rows;  // at most kStripRows
  int top;   // rows of logits
  int bottom;
};

PYDENSE_HD int64_t pieces(int64_t size, int64_t step) { return (size + step - 1) / step; }

// The outputs of an image in blocks, and those of block number i of all images.
template <class T>
PYDENSE_HD int64_t head_blocks(const HeadAxes<T>& axes) {
  return pieces(axes.y.out_size, kHeadRows) * pieces(axes.x.out_size, kHeadColumns);
}
template <class T>
__device__ __forceinline__ HeadOutputs head_outputs(const HeadAxes<T>& axes, int64_t i) {
  const int64_t across = pieces(axes.x.out_size, kHeadColumns);
  const int64_t down = pieces(axes.y.out_size, kHeadRows);
  const int64_t row = i / across % down * kHeadRows;
  const int64_t column = i % across * kHeadColumns;
  return {i / across / down, row, column,
          static_cast<int>(min(int64_t{kHeadRows}, axes.y.out_size - row)),
          static_cast<int>(min(int64_t{kHeadColumns}, axes.x.out_size - column))};
}

// Calls fn(IntConstant<rows>{}).
template <class Fn>
__device__ __forceinline__ void with_strip_rows(int rows, const Fn& fn) {
  static_assert(kStripRows == 4);
  switch (rows) {
    case 1:
      return fn(portable::IntConstant<1>{});
    case 2:
      return fn(portable::IntConstant<2>{});
    case 3:
      return fn(portable::IntConstant<3>{});
    default:
      return fn(portable::IntConstant<4>{});
  }
}

// Calls fn(i, o) for i in [0, inner), o in [0, outer), the block's threads side by side along i.
template <class Fn>
__device__ __forceinline__ void for_each_pair(int inner, int outer, const Fn& fn) {
  const int thread = static_cast<int>(threadIdx.x);
  const int step_inner = kHeadColumns % inner;
  const int step_outer = kHeadColumns / inner;
  int i = thread % inner;
  for (int o = thread / inner; o < outer; o += step_outer) {
    fn(i, o);
    i += step_inner;
    if (i >= inner) {
      i -= inner;
      ++o;
    }
  }
}

// Calls fn(i, begin, step) so that for each i in [0, inner) the numbers begin, begin + step... of
// all calls are [0, outer), the block's threads side by side along i. What hangs on i alone is then
// worked out once; threads that are not a multiple of inner have nothing to do.
template <class Fn>
__device__ __forceinline__ void for_each_line(int inner, const Fn& fn) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lines = kHeadColumns / inner;
  if (lines > 1) {
    if (thread < lines * inner) {
      fn(thread % inner, thread / inner, lines);
    }
    return;
  }
  for (int i = thread; i < inner; i += kHeadColumns) {
    fn(i, 0, 1);
  }
}

template <class S>
class HeadTile {
 public:
  using T = Accumulate<S>;

  // Classes [begin, end) of the outputs of `at`.
  __device__ HeadTile(const LogitsView& logits, const HeadAxes<T>& axes, const HeadOutputs& at,
                      int begin, int end, HeadShared<T>& shared)
      : shared_(shared), outputs_(at), class_begin_(begin), class_end_(end) {
    data_ = static_cast<const S*>(logits.data) + at.image * logits.strides[0];
    class_stride_ = logits.strides[1];
    row_stride_ = logits.strides[2];
    column_stride_ = logits.strides[3];

    const int thread = static_cast<int>(threadIdx.x);
    const int64_t last_column = at.first_column + at.columns - 1;
    const AxisTaps<T> x = portable::axis_taps(axes.x, min(at.first_column + thread, last_column));
    first_tap_ = static_cast<int>(portable::axis_taps(axes.x, at.first_column).i0);
    const int64_t span = portable::axis_taps(axes.x, last_column).i1 + 1 - first_tap_;
    dense_ = span <= kMostSlots;
    slots_ = dense_ ? static_cast<int>(span) : kMostSlots;
    left_ = dense_ ? static_cast<int>(x.i0) - first_tap_ : 2 * thread;
    right_ = dense_ ? static_cast<int>(x.i1) - first_tap_ : 2 * thread + 1;
    left_weight_ = x.w0;
    right_weight_ = x.w1;
    // Odd, so that neither threads at different slots nor at different classes meet in a bank.
    pitch_ = min(end - begin, kTileValues<T> / (2 * slots_)) | 1;
    pitch_ -= 2 * slots_ * pitch_ > kTileValues<T> ? 2 : 0;

    __syncthreads();  // until the block before, if any, has been read
    if (!dense_) {
      shared.columns[2 * thread] = static_cast<int>(x.i0);
      shared.columns[2 * thread + 1] = static_cast<int>(x.i1);
    }
    if (thread < at.rows) {
      const AxisTaps<T> y = portable::axis_taps(axes.y, at.first_row + thread);
      shared.row_taps[0][thread] = static_cast<int>(y.i0);
      shared.row_taps[1][thread] = static_cast<int>(y.i1);
      shared.row_weights[0][thread] = y.w0;
      shared.row_weights[1][thread] = y.w1;
    }
    __syncthreads();
  }

  __device__ const HeadOutputs& outputs() const { return outputs_; }
  __device__ bool is_inside() const { return static_cast<int>(threadIdx.x) < outputs_.columns; }
  __device__ int first_tap() const { return first_tap_; }
  __device__ int slots() const { return slots_; }
  __device__ int left() const { return left_; }
  __device__ int right() const { return right_; }

  // Calls fn(HeadStrip), by all threads together.
  template <class Fn>
  __device__ __forceinline__ void for_each_strip(const Fn& fn) {
    for (int row = 0; row < outputs_.rows;) {
      HeadStrip strip = {row, 1, shared_.row_taps[0][row], shared_.row_taps[1][row]};
      while (strip.rows < kStripRows && row + strip.rows < outputs_.rows &&
             shared_.row_taps[0][row + strip.rows] == strip.top) {
        ++strip.rows;
      }
      fn(strip);
      row += strip.rows;
    }
  }

  template <int Rows>
  __device__ __forceinline__ void row_weights(const HeadStrip& strip, T (&upper)[Rows],
                                              T (&lower)[Rows]) const {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      upper[r] = shared_.row_weights[0][strip.row + r];
      lower[r] = shared_.row_weights[1][strip.row + r];
    }
  }

  // Calls fn(first class, classes) for each part of the classes that shared memory holds, by all
  // threads together.
  template <class Fn>
  __device__ __forceinline__ void for_each_part(const HeadStrip& strip, const Fn& fn) {
    const int step = min(pitch_, class_end_ - class_begin_);
    for (int first = class_begin_; first < class_end_; first += step) {
      const int count = min(step, class_end_ - first);
      load(strip, first, count);
      fn(first, count);
    }
  }

  // Lets threads ask for any column; a barrier comes before that.
  __device__ void share_columns() {
    const int thread = static_cast<int>(threadIdx.x);
    shared_.column_taps[0][thread] = left_;
    shared_.column_taps[1][thread] = right_;
    shared_.column_weights[0][thread] = left_weight_;
    shared_.column_weights[1][thread] = right_weight_;
  }
  // Calls fn(class, column, top, bottom) for every class and column of the block, threads side by
  // side along the classes.
  template <class Fn>
  __device__ __forceinline__ void for_each_class_and_column(const HeadStrip& strip, const Fn& fn) {
    for_each_part(strip, [&](int first, int count) {
      const int below = slots_ * pitch_;
      for_each_pair(count, outputs_.columns, [&](int c, int column) {
        const T* const left = at(shared_.column_taps[0][column]) + c;
        const T* const right = at(shared_.column_taps[1][column]) + c;
        const T w0 = shared_.column_weights[0][column];
        const T w1 = shared_.column_weights[1][column];
        fn(first + c, column, fma(w1, right[0], w0 * left[0]),
           fma(w1, right[below], w0 * left[below]));
      });
    });
  }

  // Calls fn(class, top, bottom) where needed, with the two rows of logits at this thread's column.
  template <class Fn>
  __device__ __forceinline__ void for_each_class(const HeadStrip& strip, bool needed,
                                                 const Fn& fn) {
    for_each_part(strip, [&](int first, int count) {
      for (int c = 0; needed && c < count; ++c) {
        T top;
        T bottom;
        rows_at(c, top, bottom);
        fn(first + c, top, bottom);
      }
    });
  }

  // The two rows of logits at this thread's column, in class c of those that shared memory holds.
  __device__ __forceinline__ void rows_at(int c, T& top, T& bottom) const {
    const T* const left = at(left_) + c;
    const T* const right = at(right_) + c;
    const int below = slots_ * pitch_;
    top = fma(right_weight_, right[0], left_weight_ * left[0]);
    bottom = fma(right_weight_, right[below], left_weight_ * left[below]);
  }

  // The classes that shared memory holds, of a column of logits in the upper row, or, from slots()
  // on, in the lower one.
  __device__ const T* at(int place) const { return shared_.values + place * pitch_; }

 private:
  __device__ __forceinline__ void load(const HeadStrip& strip, int first, int count) {
    if (held_row_ == strip.top && held_class_ == first) {
      return;
    }
    held_row_ = strip.top;
    held_class_ = first;
    __syncthreads();  // until what it held has been read
    const S* const top = data_ + strip.top * row_stride_ + first * class_stride_;
    const S* const bottom = data_ + strip.bottom * row_stride_ + first * class_stride_;
    const auto column = [&](int place) {
      const int slot = place < slots_ ? place : place - slots_;
      const int x = dense_ ? first_tap_ + slot : shared_.columns[slot];
      return (place < slots_ ? top : bottom) + x * column_stride_;
    };
    if (class_stride_ == 1) {
      for_each_line(count, [&](int c, int begin, int step) {
#pragma unroll 2
        for (int place = begin; place < 2 * slots_; place += step) {
          shared_.values[place * pitch_ + c] = to_accumulate(__ldg(column(place) + c));
        }
      });
    } else {
      for_each_line(2 * slots_, [&](int place, int begin, int step) {
        const S* const from = column(place);
        T* const to = shared_.values + place * pitch_;
#pragma unroll 2
        for (int c = begin; c < count; c += step) {
          to[c] = to_accumulate(__ldg(from + c * class_stride_));
        }
      });
    }
    __syncthreads();
  }

  HeadShared<T>& shared_;
  const S* data_;
  int64_t class_stride_;
  int64_t row_stride_;
  int64_t column_stride_;
  HeadOutputs outputs_;
  int class_begin_;
  int class_end_;
  bool dense_;
  int first_tap_;
  int slots_;
  int pitch_;
  int left_;
  int right_;
  T left_weight_;
  T right_weight_;
  int held_row_ = -1;
  int held_class_ = -1;
};

}  // namespace pydense
