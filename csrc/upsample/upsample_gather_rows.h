// SPDX-License-Identifier: Apache-2.0
// Backward of one channel: rows are summed vertically as they come, and some of them at once
// collapsed horizontally, a row in each lane.
#pragma once

#include <cstring>

#include "upsample/upsample_gather.h"

namespace pydense::PYDENSE_ISA {

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
      with_constant<kRowsAtOnce>(cell.end - cell.begin, [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        if (cell.i0 == cell.i1) {
          add_cell<kRows, false>(rows, stride, y);
        } else {
          add_cell<kRows, true>(rows, stride, y);
        }
      });
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

  template <int Rows, bool Both>
  [[gnu::noinline]] void add_cell(const S* rows, int64_t stride, int64_t y) {
    RowWeights<T, Rows> weights(y_, y, Both);
    const int64_t count = x_.end - x_.begin;
    rows += x_.begin;
    const int64_t ahead = rows_ahead(Rows, stride * static_cast<int64_t>(sizeof(S))) * stride;
    int64_t x = 0;
    for (; x + kLanes <= count; x += kLanes) {
      for (int y = 0; y < Rows; ++y) {
        __builtin_prefetch(rows + x + y * stride + ahead);
      }
      add_vector<Rows, Both>(rows + x, stride, weights, x,
                             [](const S* from) { return load_as<V>(from); });
    }
    if (x < count) {
      add_vector<Rows, Both>(rows + x, stride, weights, x,
                             [=](const S* from) { return load_part<V>(from, count - x); });
    }
  }

  template <int Rows, bool Both, class Load>
  PYDENSE_HD void add_vector(const S* from, int64_t stride, const RowWeights<T, Rows>& weights,
                             int64_t x, const Load& load_row) {
    V sum0 = load<V>(row_sum_ + x);
    V sum1 = Both ? load<V>(next_sum_ + x) : V{};
#pragma GCC unroll 8
    for (int y = 0; y < Rows; ++y) {
      const V grad = load_row(from + y * stride);
      sum0 = fma(weights.own[y], grad, sum0);
      if constexpr (Both) {
        sum1 = fma(weights.next[y], grad, sum1);
      }
    }
    store(row_sum_ + x, sum0);
    if constexpr (Both) {
      store(next_sum_ + x, sum1);
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

}  // namespace pydense::PYDENSE_ISA
