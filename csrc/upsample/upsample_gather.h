// SPDX-License-Identifier: Apache-2.0
// Backward, one input and one plane at a time: rows of the output's gradient come in from the top,
// rows of the input's gradient go out. Each number of the output's gradient is read once. Rows
// between the same two rows of the input are summed first, vertically, in registers.
//
// GatherRows serves one channel, GatherPixels some channels of a channels_last picture.
#pragma once

#include "common/simd.h"
#include "upsample/upsample_cpu.h"

namespace pydense::PYDENSE_ISA {

// More rows at once than this, and the caches' ways and the prefetchers run out.
constexpr int64_t kRowsAtOnce = 8;

// Output rows [begin, end) with the same two taps.
struct Cell {
  int64_t begin;
  int64_t end;
  int64_t i0;
  int64_t i1;
};

// The cell that starts at y, cut after `limit` outputs.
template <class T>
PYDENSE_HD Cell cell_at(const AxisTable<T>& axis, int64_t y, int64_t end, int64_t limit) {
  Cell cell = {y, y + 1, axis.i0[y], axis.i1[y]};
  end = smaller(end, y + limit);
  while (cell.end < end && axis.i0[cell.end] == cell.i0 && axis.i1[cell.end] == cell.i1) {
    ++cell.end;
  }
  return cell;
}

template <class S>
class GatherRows {
  using T = ComputeOf<S>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  // A row for each lane, and the two that sums go to.
  static constexpr int kSlots = kLanes + 2;

 public:
  GatherRows(const AxisTable<T>& y, const AxisTable<T>& x, int64_t in_width, int64_t out_width)
      : y_(y),
        x_(x),
        in_width_(in_width),
        length_(ceil_div(out_width, kLanes) * kLanes),
        buffer_(
            buffer_of<T>(static_cast<size_t>(kSlots * length_ + (in_width + kLanes) * kLanes))) {
    for (int i = 0; i < kSlots; ++i) {
      slots_[i] = buffer_.template as<T>() + i * length_;
    }
    columns_ = buffer_.template as<T>() + kSlots * length_;
  }

  // Rows [first, end) of a plane of the input's gradient follow, from the output's row
  // first_output on.
  void begin(S* plane, int64_t first, int64_t end, int64_t first_output) {
    plane_ = plane;
    first_ = first;
    end_ = end;
    row_ = smaller(first, larger(first_output < y_.end ? y_.i0[first_output] : first, 0));
    row_sum_ = fresh();
    next_sum_ = fresh();
  }

  // Rows [y, end_y) of the output's gradient, the first one at `rows`.
  void add(const S* rows, int64_t stride, int64_t y, int64_t end_y) {
    const int64_t begin_y = larger(y, y_.begin);
    rows += (begin_y - y) * stride;
    end_y = smaller(end_y, y_.end);
    for (y = begin_y; y < end_y;) {
      const Cell cell = cell_at(y_, y, end_y, kRowsAtOnce);
      advance(cell.i0);
      if (cell.i0 == cell.i1) {
        add_cell<false>(rows, stride, cell);
      } else {
        add_cell<true>(rows, stride, cell);
      }
      rows += (cell.end - cell.begin) * stride;
      y = cell.end;
    }
  }

  void end() {
    advance(end_);
    give_back(row_sum_);
    give_back(next_sum_);
  }

  // Writes what rows are still waiting for company.
  void flush() {
    if (pending_ == 0) {
      return;
    }
    collapse();
    for (int64_t j = 0; j < in_width_; j += kLanes) {
      V v[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) {
        v[k] = load<V>(columns_ + (j + k) * kLanes);
      }
      transpose_square(v);
      const int64_t count = in_width_ - j;
      for (int64_t r = 0; r < pending_; ++r) {
        if (count >= kLanes) {
          store_as(targets_[r] + j, v[r]);
        } else {
          store_part(targets_[r] + j, v[r], count);
        }
      }
    }
    for (int64_t r = 0; r < pending_; ++r) {
      slots_[free_++] = waiting_[r];
    }
    pending_ = 0;
  }

 private:
  T* fresh() {
    T* const slot = slots_[--free_];
    std::memset(slot, 0, static_cast<size_t>(length_) * sizeof(T));
    return slot;
  }
  void give_back(T* slot) { slots_[free_++] = slot; }

  void advance(int64_t row) {
    for (; row_ < row; ++row_) {
      if (row_ >= first_ && row_ < end_) {
        waiting_[pending_] = row_sum_;
        targets_[pending_++] = plane_ + row_ * in_width_;
      } else {
        give_back(row_sum_);
      }
      if (pending_ == kLanes) {
        flush();
      }
      row_sum_ = next_sum_;
      next_sum_ = fresh();
    }
  }

  template <bool Both>
  void add_cell(const S* rows, int64_t stride, const Cell& cell) {
    const int64_t end = x_.end;
    int64_t x = x_.begin;
    for (; x + kLanes <= end; x += kLanes) {
      add_vector<Both>(rows + x, stride, cell, x, [](const S* from) { return load_as<V>(from); });
    }
    if (x < end) {
      const int64_t count = end - x;
      add_vector<Both>(rows + x, stride, cell, x,
                       [=](const S* from) { return load_part<V>(from, count); });
    }
  }

  template <bool Both, class Load>
  PYDENSE_HD void add_vector(const S* from, int64_t stride, const Cell& cell, int64_t x,
                             const Load& load_row) {
    T* const own = row_sum_ + (x - x_.begin);
    T* const next = next_sum_ + (x - x_.begin);
    V sum0 = load<V>(own);
    V sum1 = Both ? load<V>(next) : V{};
    for (int64_t y = cell.begin; y < cell.end; ++y, from += stride) {
      const V grad = load_row(from);
      sum0 = fma(broadcast<V>(Both ? y_.w0[y] : y_.w0[y] + y_.w1[y]), grad, sum0);
      if constexpr (Both) {
        sum1 = fma(broadcast<V>(y_.w1[y]), grad, sum1);
      }
    }
    store(own, sum0);
    if constexpr (Both) {
      store(next, sum1);
    }
  }

  // columns_[j][r] = sum over x of the weight of x for column j times waiting_[r][x]: a lane is a
  // row, so that any map of columns costs two fused products per column of the output.
  void collapse() {
    const T* rows[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      rows[r] = waiting_[r < pending_ ? r : 0];
    }
    T* to = columns_;
    T* const to_end = columns_ + in_width_ * kLanes;
    V sum0{};
    V sum1{};
    int64_t j = 0;
    for (int64_t block = x_.begin; block < x_.end; block += kLanes) {
      V v[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        v[r] = load<V>(rows[r] + (block - x_.begin));
      }
      transpose_square(v);
      const int64_t end = smaller(block + kLanes, x_.end);
      for (int64_t x = block; x < end; ++x) {
        const int64_t i0 = x_.i0[x];
        for (; j < i0; ++j, to += kLanes) {
          store(to, sum0);
          sum0 = sum1;
          sum1 = V{};
        }
        const V grad = v[x - block];
        if (x_.i1[x] == i0) {
          sum0 = fma(broadcast<V>(x_.w0[x] + x_.w1[x]), grad, sum0);
        } else {
          sum0 = fma(broadcast<V>(x_.w0[x]), grad, sum0);
          sum1 = fma(broadcast<V>(x_.w1[x]), grad, sum1);
        }
      }
    }
    for (; to < to_end; to += kLanes) {
      store(to, sum0);
      sum0 = sum1;
      sum1 = V{};
    }
  }

  const AxisTable<T>& y_;
  const AxisTable<T>& x_;
  int64_t in_width_;
  int64_t length_;
  Buffer buffer_;
  T* columns_;  // [in_width, kLanes], and kLanes rows more to read
  T* slots_[kSlots];
  int64_t free_ = kSlots;
  T* waiting_[kLanes];
  S* targets_[kLanes];
  int64_t pending_ = 0;
  S* plane_ = nullptr;
  int64_t first_ = 0;
  int64_t end_ = 0;
  int64_t row_ = 0;  // the row of the input that row_sum_ belongs to
  T* row_sum_ = nullptr;
  T* next_sum_ = nullptr;
};

// Where the pixels of a row of the output's gradient lie.
template <class S>
struct PixelRows {
  const S* data;  // the first of the channels
  int64_t row_stride;
  int64_t pixel_stride;
  int64_t readable;  // elements of a row from its first one on
};

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
      const Cell cell = cell_at(y_, y, end_y, kRowsAtOnce);
      advance(cell.i0);
      for (int64_t x = x_.begin; x < x_.end;) {
        const Cell column = cell_at(x_, x, x_.end, x_.end);
        // Vectors read past the channels, into the next pixels; not so at the end of a row.
        if ((column.end - 1) * rows.pixel_stride + padded_ <= rows.readable) {
          add_cell(rows, cell, column, [](const S* from, int64_t) { return load_as<V>(from); });
        } else {
          add_cell(rows, cell, column, [this](const S* from, int64_t c) {
            return load_part<V>(from, smaller(count_ - c, kLanes));
          });
        }
        x = column.end;
      }
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

  template <class Load>
  PYDENSE_HD void add_cell(const PixelRows<S>& rows, const Cell& cell, const Cell& column,
                           const Load& load_pixel) {
    const bool both_y = cell.i0 != cell.i1;
    const bool both_x = column.i0 != column.i1;
    for (int64_t c = 0; c < padded_; c += kLanes) {
      V sums[2][2] = {};
      for (int64_t x = column.begin; x < column.end; ++x) {
        const S* from = rows.data + x * rows.pixel_stride + c;
        V up{};
        V down{};
        for (int64_t y = cell.begin; y < cell.end; ++y, from += rows.row_stride) {
          const V grad = load_pixel(from, c);
          up = fma(broadcast<V>(both_y ? y_.w0[y] : y_.w0[y] + y_.w1[y]), grad, up);
          down = fma(broadcast<V>(y_.w1[y]), grad, down);
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
