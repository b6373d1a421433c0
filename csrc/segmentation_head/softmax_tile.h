// SPDX-License-Identifier: Apache-2.0
// Softmax of a group of source rows, block by block, and the way back for its gradient.
//
// A tile of columns goes down the source rows. Each row is loaded once, made relative to its own
// largest class (softmax does not change, and every interpolated value is at most 0: no pass for
// the maximum), scaled to powers of 2 and interpolated along x. A block is one vector of columns
// times a few output rows: powers of all classes stay in the first-level cache, their sums in
// registers. For a gradient the rows of a block fall onto the two source rows, and once per source
// row all columns fall onto the source's columns, for which a vector holds classes.
//
// Relative to the sources' largest classes all of a pixel's values may be far below 0, where its
// neighbours have large logits of different classes: a block in which a sum gets too small is made
// again relative to the pixels' own largest values.
#pragma once

#include <cstring>
#include <iterator>
#include <limits>

#include "segmentation_head/exp2_log.h"
#include "segmentation_head/gradient_tile.h"

namespace pydense::PYDENSE_ISA {

template <class T>
class SoftmaxTile {
 public:
  static constexpr int kLanes = ColumnTile<T>::kLanes;
  static constexpr int kMaxRows = 4;  // of a block
  // Tiles grow by as many columns on every instruction set: sums have one order.
  static constexpr int kStep = 64 / sizeof(T);
  static constexpr int64_t kMaxWidth = int64_t{8} * kStep;
  using V = Vec<T, kLanes>;

  // With `miss` there is one more plane, for the sum over the classes times `weight` (null for 1).
  SoftmaxTile(const LogitsView& logits, const AxisTable<T>& y, const AxisTable<T>& x,
              const GradientArray<T>& gradient, int64_t image, bool miss, const T* weight)
      : logits_(logits),
        y_(y),
        x_(x),
        gradient_(logits, x, gradient, image),
        image_(image),
        classes_(logits.classes),
        miss_(miss),
        weight_(weight) {}

  // A few output rows of a tile that lie between the same two source rows.
  struct Strip {
    int64_t begin;
    int64_t end;
    int top;  // slots
    int bottom;
  };

  // Calls fn(Strip) for all output rows of a group of source rows, tile by tile.
  template <class Fn>
  void run(int64_t group, const Fn& fn) {
    const OutputRows rows = rows_of_group(y_, group);
    if (gradient_.wanted()) {
      gradient_.zero(group);
    }
    if (rows.begin == rows.end) {
      return;
    }
    for (int64_t x = 0; x < x_.size;) {
      const int64_t next = end_of_tile(x);
      const ColumnTile<T> columns(x_, x, next);
      columns_ = &columns;
      allocate();
      down(rows, fn);
      x = next;
    }
  }

  const ColumnTile<T>& columns() const { return *columns_; }
  int64_t width() const { return width_; }  // of the tile in whole steps
  bool has_gradient() const { return gradient_.wanted(); }
  // The values, relative and in units of log(2), of block b of a slot: [planes, width].
  const T* values(int slot, int64_t b) const { return values_[slot] + b * kLanes; }
  T* falls(int slot, int64_t b) const { return falls_[slot] + b * kLanes; }
  T* powers() const { return powers_; }  // [classes, rows of the block, kLanes]
  const T* weights0(int64_t y) const { return y_.w0 + y; }
  const T* weights1(int64_t y) const { return y_.w1 + y; }

  template <int Count>
  struct Sums {
    V sum[Count];
    V largest[Count];  // where it is asked for
    V shift[Count];    // what the powers are relative to
  };

  // Sums below this are made again. For a loss and its gradient the sum alone matters;
  static constexpr T kSmallSum = sizeof(T) == 4 ? T(1e-25) : T(1e-280);
  // for a result that ends at 0 where torch's does, small powers of a small sum as well.
  static constexpr T kSmallSumOfPowers = T(1e-7);

  // Powers of all classes of block b, kept for Keep, and their sums.
  template <int Count, bool Keep>
  void exponentials(const Strip& rows, int64_t b, bool largest, Sums<Count>& sums,
                    T small_sum = kSmallSum) {
    const T* const upper = values(rows.top, b);
    const T* const lower = values(rows.bottom, b);
    const T* const h0 = weights0(rows.begin);
    const T* const h1 = weights1(rows.begin);
    if (largest) {
      add_powers<Count, Keep, true>(upper, lower, h0, h1, sums.sum, sums.largest);
    } else {
      add_powers<Count, Keep, false>(upper, lower, h0, h1, sums.sum, sums.largest);
    }
    bool small = false;
    for (int r = 0; r < Count; ++r) {
      sums.shift[r] = V{};
      for (int l = 0; l < kLanes; ++l) {
        small = small || sums.sum[r][l] < small_sum;
      }
    }
    if (small) [[unlikely]] {
      for (int r = 0; r < Count; ++r) {
        shifted_powers(upper, lower, h0[r], h1[r], powers_ + r * kLanes, Count * kLanes,
                       &sums.sum[r], &sums.shift[r]);
        sums.largest[r] = sums.shift[r];
      }
    }
  }

  // Adds to the falls of a block: the powers of its rows times these factors.
  template <int Rows>
  [[gnu::noinline]] void fall(const V* to_upper, const V* to_lower, T* upper, T* lower) const {
    V above[Rows];
    V below[Rows];
    for (int r = 0; r < Rows; ++r) {
      above[r] = to_upper[r];
      below[r] = to_lower[r];
    }
    const T* from = powers_;
    for (int64_t c = 0; c < classes_; ++c) {
      V power[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        power[r] = load<V>(from);
        from += kLanes;
      }
      V sum_above = above[0] * power[0];
      V sum_below = below[0] * power[0];
#pragma GCC unroll 4
      for (int r = 1; r < Rows; ++r) {
        sum_above = fma(above[r], power[r], sum_above);
        sum_below = fma(below[r], power[r], sum_below);
      }
      // One after the other: the two source rows are one where the sizes of the axis are equal.
      store(upper + c * width_, load<V>(upper + c * width_) + sum_above);
      store(lower + c * width_, load<V>(lower + c * width_) + sum_below);
    }
  }

 private:
  // As many columns as need kSources sources, in whole steps.
  int64_t end_of_tile(int64_t x) const {
    constexpr int64_t kSources = 16;
    const int64_t size = x_.size;
    const int32_t* const i0 = x_.i0;
    const int32_t* const i1 = x_.i1;
    int64_t end = std::min(x + kStep, size);
    while (end < size && end - x < kMaxWidth) {
      const int64_t next = std::min(end + kStep, size);
      if (i1[next - 1] - i0[x] >= kSources) {
        break;
      }
      end = next;
    }
    return end;
  }

  int64_t planes() const { return classes_ + (miss_ ? 1 : 0); }

  void allocate() {
    width_ = round_up(columns_->end() - columns_->begin(), kStep);
    stride_ = columns_->source_stride();
    row_ = round_up(planes(), kLanes) * width_;
    const bool back = gradient_.wanted();
    const int64_t sizes[] = {row_,
                             row_,
                             back ? row_ : 0,
                             back ? row_ : 0,
                             classes_ * kMaxRows * kLanes,
                             planes() * stride_,
                             back ? GradientTile<T>::scratch_of(columns_->sources()) : 0};
    T* scratch = nullptr;
    T** const arrays[] = {&values_[0], &values_[1], &falls_[0], &falls_[1],
                          &powers_,    &source_,    &scratch};
    int64_t total = 0;
    for (const int64_t size : sizes) {
      total += round_up(size, kStep);
    }
    const auto bytes = static_cast<size_t>(total) * sizeof(T);
    if (buffer_.bytes() < bytes) {
      buffer_ = Buffer(bytes);
    }
    T* at = buffer_.template as<T>();
    for (size_t k = 0; k < std::size(sizes); ++k) {
      *arrays[k] = at;
      at += round_up(sizes[k], kStep);
    }
    slots_[0] = slots_[1] = -1;
    if (back) {
      std::memset(falls_[0], 0, static_cast<size_t>(2 * row_) * sizeof(T));
      gradient_.start(*columns_, width_, scratch);
    }
  }

  template <class Fn>
  void down(const OutputRows& rows, const Fn& fn) {
    for (int64_t begin = rows.begin; begin < rows.end;) {
      const int64_t at = begin;
      int64_t end = begin + 1;
      while (end < rows.end && end - begin < kMaxRows && y_.i0[end] == y_.i0[at]) {
        ++end;
      }
      const int top = slot_of(y_.i0[at], y_.i1[at]);
      const int bottom = slot_of(y_.i1[at], y_.i0[at]);
      fn(Strip{begin, end, top, bottom});
      begin = end;
    }
    leave(0);
    leave(1);
  }

  // The slot of source row i; row `other` stays.
  int slot_of(int64_t i, int64_t other) {
    for (int slot = 0; slot < 2; ++slot) {
      if (slots_[slot] == i) {
        return slot;
      }
    }
    const int slot = slots_[0] == other ? 1 : 0;
    leave(slot);
    slots_[slot] = i;
    enter(slot);
    return slot;
  }

  void leave(int slot) {
    if (gradient_.wanted() && slots_[slot] >= 0) {
      gradient_.add(slots_[slot], falls_[slot], miss_, weight_);
      std::memset(falls_[slot], 0, static_cast<size_t>(row_) * sizeof(T));
    }
    slots_[slot] = -1;
  }

  // Loads a source row: interpolated along x, relative to the largest class, in units of log(2).
  void enter(int slot) {
    load_source(logits_, image_, slots_[slot], columns_->first_source(), columns_->sources(),
                source_, stride_);
    constexpr T kLog2E = 1.4426950408889634;
    for (int64_t x = 0; x < columns_->sources(); x += kLanes) {
      V largest = V{} - std::numeric_limits<T>::infinity();  // of those that are not NaN
      for (int64_t c = 0; c < classes_; ++c) {
        largest = max(load<V>(source_ + c * stride_ + x), largest);
      }
      V sum = {};
      for (int64_t c = 0; c < classes_; ++c) {
        T* const at = source_ + c * stride_ + x;
        const V v = (load<V>(at) - largest) * broadcast<V>(kLog2E);
        // One NaN for all: exp2_nonpositive looks at the lowest bits.
        const V quiet = v == v ? v : V{} + std::numeric_limits<T>::quiet_NaN();
        store(at, quiet);
        sum = weight_ == nullptr ? sum + quiet : fma(quiet, broadcast<V>(weight_[c]), sum);
      }
      if (miss_) {
        store(source_ + classes_ * stride_ + x, sum);
      }
    }
    for (int64_t c = 0; c < planes(); ++c) {
      T* const to = values_[slot] + c * width_;
      for (int64_t b = 0; b < columns_->count(); ++b) {
        store(to + b * kLanes, columns_->block(b).interpolate(source_ + c * stride_));
      }
    }
  }

  template <int Rows, bool Keep, bool Largest>
  [[gnu::noinline]] void add_powers(const T* upper, const T* lower, const T* h0, const T* h1,
                                    V* sums, V* largests) const {
    V sum[Rows] = {};
    V largest[Rows];
    for (int r = 0; r < Rows; ++r) {
      largest[r] = V{} - std::numeric_limits<T>::infinity();
    }
    T* to = powers_;
    for (int64_t c = 0; c < classes_; ++c) {
      const V above = load<V>(upper + c * width_);
      const V below = load<V>(lower + c * width_);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const V v = fma(broadcast<V>(h1[r]), below, broadcast<V>(h0[r]) * above);
        if constexpr (Largest) {
          largest[r] = max(v, largest[r]);
        }
        const V power = exp2_nonpositive(v);
        sum[r] = sum[r] + power;
        if constexpr (Keep) {
          store(to, power);
          to += kLanes;
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      sums[r] = sum[r];
      largests[r] = largest[r];
    }
  }

  // Powers of one output row, relative to the pixels' largest values.
  [[gnu::noinline]] void shifted_powers(const T* upper, const T* lower, T h0, T h1, T* to,
                                        int64_t to_stride, V* sums, V* shifts) const {
    const auto value = [&](int64_t c) {
      return fma(broadcast<V>(h1), load<V>(lower + c * width_),
                 broadcast<V>(h0) * load<V>(upper + c * width_));
    };
    V shift = value(0);
    for (int64_t c = 1; c < classes_; ++c) {
      shift = max(value(c), shift);
    }
    V sum = {};
    for (int64_t c = 0; c < classes_; ++c) {
      const V power = exp2_nonpositive(value(c) - shift);
      sum = sum + power;
      store(to + c * to_stride, power);
    }
    *sums = sum;
    *shifts = shift;
  }

  const LogitsView& logits_;
  const AxisTable<T>& y_;
  const AxisTable<T>& x_;
  GradientTile<T> gradient_;
  int64_t image_;
  int64_t classes_;
  bool miss_;
  const T* weight_;

  const ColumnTile<T>* columns_ = nullptr;
  int64_t width_ = 0;
  int64_t stride_ = 0;           // of a class in source_
  int64_t row_ = 0;              // elements of a slot
  int64_t slots_[2] = {-1, -1};  // their source rows
  Buffer buffer_;
  T* values_[2] = {};    // [planes, width_]
  T* falls_[2] = {};     // [planes, width_], the gradient of those values
  T* powers_ = nullptr;  // [classes, rows of the block, kLanes]
  T* source_ = nullptr;  // [planes, stride_]
};

}  // namespace pydense::PYDENSE_ISA
