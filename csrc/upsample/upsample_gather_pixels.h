// SPDX-License-Identifier: Apache-2.0
// Backward of some channels of a channels_last picture: a channel in each lane.
#pragma once

#include <cstring>

#include "upsample/upsample_gather.h"

namespace pydense::PYDENSE_ISA {

// Where the pixels of a row of the output's gradient lie.
template <class S>
struct PixelRows {
  const S* data;  // the first of the channels
  int64_t row_stride;
  int64_t pixel_stride;
  int64_t readable;  // elements of a row from its first one on
};

// The same on all instruction sets: how sums are cut decides their bits here.
constexpr int kPixelRowsAtOnce = 4;

template <class S>
class GatherPixels {
  using T = ComputeOf<S>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;

 public:
  GatherPixels(const AxisTable<T>& y, const AxisTable<T>& x, int64_t in_width, int64_t channels,
               int64_t count)
      : y_(y),
        x_(x),
        in_width_(in_width),
        channels_(channels),
        count_(count),
        padded_(ceil_div(count, kLanes) * kLanes),
        buffer_(buffer_of<T>(static_cast<size_t>(2 * in_width * padded_))),
        row_sum_(buffer_.template as<T>()),
        next_sum_(row_sum_ + in_width * padded_) {}

  // As GatherRows; `picture` is the first of the channels.
  void begin(S* picture, int64_t first, int64_t end, int64_t first_output) {
    picture_ = picture;
    first_ = first;
    end_ = end;
    row_ = smaller(first, larger(first_output < y_.end ? y_.i0[first_output] : first, 0));
    std::memset(buffer_.data(), 0, static_cast<size_t>(2 * in_width_ * padded_) * sizeof(T));
  }

  void add(PixelRows<S> rows, int64_t y, int64_t end_y) {
    const int64_t begin_y = larger(y, y_.begin);
    rows.data += (begin_y - y) * rows.row_stride;
    end_y = smaller(end_y, y_.end);
    for (y = begin_y; y < end_y;) {
      const Cell cell = cell_at(y_, y, end_y, kPixelRowsAtOnce);
      advance(cell.i0);
      with_constant<kPixelRowsAtOnce>(
          cell.end - cell.begin, [&](auto count) { add_rows<decltype(count)::value>(rows, cell); });
      rows.data += (cell.end - cell.begin) * rows.row_stride;
      y = cell.end;
    }
  }

  void end() { advance(end_); }

 private:
  void advance(int64_t row) {
    const int64_t elements = in_width_ * padded_;
    for (; row_ < row; ++row_) {
      if (row_ >= first_ && row_ < end_) {
        S* const to = picture_ + row_ * in_width_ * channels_;
        for (int64_t j = 0; j < in_width_; ++j) {
          store_pixel(row_sum_ + j * padded_, to + j * channels_);
        }
      }
      T* const done = row_sum_;
      row_sum_ = next_sum_;
      next_sum_ = done;
      std::memset(done, 0, static_cast<size_t>(elements) * sizeof(T));
    }
  }

  void store_pixel(const T* from, S* to) const {
    int64_t c = 0;
    for (; c + kLanes <= count_; c += kLanes) {
      store_as(to + c, load<V>(from + c));
    }
    if (c < count_) {
      store_part(to + c, load<V>(from + c), count_ - c);
    }
  }

  template <int Rows>
  [[gnu::noinline]] void add_rows(const PixelRows<S>& rows, const Cell& cell) {
    const RowWeights<T, Rows> weights(y_, cell.begin, cell.i0 != cell.i1);
    const int64_t ahead = elements_ahead<S>(rows.pixel_stride);
    for (int64_t x = x_.begin; x < x_.end;) {
      const Cell column = cell_at(x_, x, x_.end, x_.end);
      // Vectors read past the channels, into the next pixels; not so at the end of a row.
      if ((column.end - 1) * rows.pixel_stride + padded_ <= rows.readable) {
        add_cell(rows, weights, cell, column, ahead,
                 [](const S* from, int64_t) { return load_as<V>(from); });
      } else {
        add_cell(rows, weights, cell, column, ahead, [this](const S* from, int64_t c) {
          return load_part<V>(from, smaller(count_ - c, kLanes));
        });
      }
      x = column.end;
    }
  }

  template <int Rows, class Load>
  PYDENSE_HD void add_cell(const PixelRows<S>& rows, const RowWeights<T, Rows>& weights,
                           const Cell& cell, const Cell& column, int64_t ahead,
                           const Load& load_pixel) {
    const bool both_y = cell.i0 != cell.i1;
    const bool both_x = column.i0 != column.i1;
    for (int64_t c = 0; c < padded_; c += kLanes) {
      V sums[2][2] = {};
      for (int64_t x = column.begin; x < column.end; ++x) {
        const S* const from = rows.data + x * rows.pixel_stride + c;
        V up{};
        V down{};
#pragma GCC unroll 8
        for (int y = 0; y < Rows; ++y) {
          __builtin_prefetch(from + y * rows.row_stride + ahead);
          const V grad = load_pixel(from + y * rows.row_stride, c);
          up = fma(weights.own[y], grad, up);
          down = fma(weights.next[y], grad, down);
        }
        const V w0 = broadcast<V>(both_x ? x_.w0[x] : x_.w0[x] + x_.w1[x]);
        const V w1 = broadcast<V>(x_.w1[x]);
        sums[0][0] = fma(w0, up, sums[0][0]);
        sums[0][1] = fma(w1, up, sums[0][1]);
        sums[1][0] = fma(w0, down, sums[1][0]);
        sums[1][1] = fma(w1, down, sums[1][1]);
      }
      for (int64_t i = 0; i < (both_y ? 2 : 1); ++i) {
        T* const to = (i == 0 ? row_sum_ : next_sum_) + c;
        T* const own = to + column.i0 * padded_;
        store(own, load<V>(own) + sums[i][0]);
        if (both_x) {
          T* const next = to + column.i1 * padded_;
          store(next, load<V>(next) + sums[i][1]);
        }
      }
    }
  }

  const AxisTable<T>& y_;
  const AxisTable<T>& x_;
  int64_t in_width_;
  int64_t channels_;  // of the picture
  int64_t count_;     // of these, that are gathered
  int64_t padded_;
  Buffer buffer_;
  T* row_sum_;  // [in_width, padded]
  T* next_sum_;
  S* picture_ = nullptr;
  int64_t first_ = 0;
  int64_t end_ = 0;
  int64_t row_ = 0;
};

}  // namespace pydense::PYDENSE_ISA
