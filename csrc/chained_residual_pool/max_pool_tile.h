// SPDX-License-Identifier: Apache-2.0
// Pools a tile of a picture, row by row, over a ring of reduced rows as long as the window is high.
#pragma once

#include <limits>

#include "chained_residual_pool/max_pool_rows.h"
#include "common/buffer.h"

namespace pydense::PYDENSE_ISA {

// The channels of one image that are pooled together: `unit` of them lie side by side in a pixel.
template <class S>
struct PoolPicture {
  const S* from;  // first of the channels, at row 0 and column 0
  int64_t row_stride;
  int64_t pixel_stride;
  int64_t height;
  int64_t width;
  int64_t unit;
};

struct PoolTile {
  int64_t top;
  int64_t bottom;
  int64_t left;
  int64_t right;
};

// Pools tiles of at most `columns` columns and `unit` channels with one set of rows.
template <class S, class Out>
class TilePool {
  using T = ComputeOf<S>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using Int = IntOf<T>;
  using I = Vec<Int, kLanes>;
  static constexpr int kMaxSlots = 16;

 public:
  TilePool(int size, bool offsets, int64_t columns, int64_t unit)
      : size_(size),
        reach_(size / 2),
        offsets_(offsets),
        // In whole vectors: what comes after it is aligned.
        padded_size_((ceil_div((columns + 2 * reach_) * unit, kLanes) + 2) * kLanes) {
    while (slots_ < size + 1) {  // a power of 2, and one more row for pairs
      slots_ *= 2;
    }
    const int64_t row = (columns * unit + int64_t{2} * kLanes - 1) / kLanes * kLanes;
    buffer_ = buffer_of<T>(static_cast<size_t>(padded_size_ + slots_ * row * (offsets ? 2 : 1)));
    padded_ = buffer_.as<T>();
    for (int j = 0; j < slots_; ++j) {
      best_[j] = padded_ + padded_size_ + j * row;
      code_[j] = offsets ? reinterpret_cast<Int*>(best_[j] + slots_ * row) : nullptr;
    }
  }

  // sink_of(y) says where row y of the tile goes.
  template <class SinkOf>
  void run(const PoolPicture<S>& picture, const PoolTile& tile, const SinkOf& sink_of) {
    picture_ = &picture;
    tile_ = tile;
    count_ = (tile.right - tile.left) * picture.unit;
    first_ = larger(0, tile.left - reach_);
    end_ = smaller(picture.width, tile.right + reach_);
    pad(0, (first_ - (tile.left - reach_)) * picture.unit);
    pad((end_ - (tile.left - reach_)) * picture.unit, (tile.right + reach_ - end_) * picture.unit);
    int64_t next = larger(0, tile.top - reach_);
    const auto reduce_until = [&](int64_t end) {
      for (; next < smaller(picture.height, end); ++next) {
        reduce_row(next);
      }
    };
    for (int64_t y = tile.top; y < tile.bottom;) {
      const bool pair = (size_ == 5 || size_ == 3) && y >= reach_ && y + 1 < tile.bottom &&
                        y + 1 + reach_ < picture.height;
      const PoolSink<Out> sink = sink_of(y);
      if (pair && sink_of(y + 1).phase == sink.phase) {
        reduce_until(y + reach_ + 2);
        emit_pair(y, sink, sink_of(y + 1));
        y += 2;
      } else {
        reduce_until(y + reach_ + 1);
        emit(y, sink);
        y += 1;
      }
    }
  }

 private:
  int slot_of(int64_t y) const { return static_cast<int>(y & (slots_ - 1)); }

  void reduce_row(int64_t y) {
    if (reduce_in_place(y)) {
      return;
    }
    const int slot = slot_of(y);
    const int64_t unit = picture_->unit;
    nan_[slot] = stage(picture_->from + y * picture_->row_stride);
    visit(size_, nan_[slot], [&](auto k, auto nan, auto offsets) {
      pool_along_x<T, decltype(k)::value, decltype(nan)::value, decltype(offsets)::value>(
          size_, padded_, unit, count_, best_[slot], code_[slot]);
    });
    // Padding won only where all is -inf: there the first column in the picture is meant.
    for (int64_t x = tile_.left; offsets_ && x < smaller(reach_, tile_.right); ++x) {
      Int* const code = code_[slot] + (x - tile_.left) * unit;
      const Int least = static_cast<Int>(reach_ - x);
      for (int64_t e = 0; e < unit; ++e) {
        code[e] = code[e] < least ? least : code[e];
      }
    }
  }

  // Without a copy of the row, where that can be.
  bool reduce_in_place(int64_t y) {
    const bool pixels = picture_->unit % kLanes == 0;
    const bool columns = kShifts<T> && picture_->unit == 1 && picture_->pixel_stride == 1 &&
                         (tile_.left == 0 || tile_.left >= kLanes);
    if ((size_ != 3 && size_ != 5) || !(pixels || columns)) {
      return false;
    }
    const int slot = slot_of(y);
    const S* const row = picture_->from + y * picture_->row_stride;
    const auto reduce = [&](bool with_nan) {
      visit(size_, with_nan, [&](auto k, auto nan, auto offsets) {
        constexpr int kSize = decltype(k)::value;
        constexpr bool kNan = decltype(nan)::value;
        constexpr bool kOffsets = decltype(offsets)::value;
        if constexpr (kSize > 0) {
          if (pixels) {
            nan_[slot] = pool_pixels_along_x<T, kSize, kNan, kOffsets>(
                row, picture_->row_stride, picture_->pixel_stride, picture_->unit, tile_.left,
                tile_.right, picture_->width, best_[slot], code_[slot]);
          } else if constexpr (kShifts<T>) {
            nan_[slot] = pool_row_along_x<T, kSize, kNan, kOffsets>(
                row, tile_.left, tile_.right, picture_->width, best_[slot], code_[slot]);
          }
        }
      });
    };
    reduce(false);
    if (nan_[slot]) {
      reduce(true);
    }
    return true;
  }

  // The ring's rows in [begin, end), both in the picture. Returns whether one holds a NaN.
  bool open(int64_t begin, int64_t end, PoolWindow<T>& window) const {
    window.rows = static_cast<int>(end - begin);
    window.codes = offsets_ ? reinterpret_cast<T*>(code_[0]) - best_[0] : 0;
    bool nan = false;
    for (int j = 0; j < window.rows; ++j) {
      const int slot = slot_of(begin + j);
      window.best[j] = best_[slot];
      nan = nan || nan_[slot];
    }
    return nan;
  }

  void emit(int64_t y, const PoolSink<Out>& sink) {
    const int64_t begin = larger(0, y - reach_);
    PoolWindow<T> window;
    const bool nan = open(begin, smaller(picture_->height, y + reach_ + 1), window);
    window.first = static_cast<int>(begin - (y - reach_));
    visit(window.rows == size_ ? size_ : 0, nan, [&](auto k, auto with_nan, auto offsets) {
      pool_along_y<T, Out, decltype(k)::value, decltype(with_nan)::value, decltype(offsets)::value>(
          window, count_, sink);
    });
  }

  void emit_pair(int64_t y, const PoolSink<Out>& upper, const PoolSink<Out>& lower) {
    PoolWindow<T> window;
    const bool nan = open(y - reach_, y + reach_ + 2, window);
    window.first = 0;
    visit(size_, nan, [&](auto k, auto with_nan, auto offsets) {
      if constexpr (decltype(k)::value > 0) {
        pool_along_y_twice<T, Out, decltype(k)::value, decltype(with_nan)::value,
                           decltype(offsets)::value>(window, count_, upper, lower);
      }
    });
  }

  // Calls fn with constants: the usual sizes of the window or 0, NaN or none, offsets or none.
  template <class Fn>
  void visit(int size, bool nan, const Fn& fn) {
    const auto with_size = [&](auto with_nan, auto offsets) {
      if (size == 5) {
        fn(std::integral_constant<int, 5>{}, with_nan, offsets);
      } else if (size == 3) {
        fn(std::integral_constant<int, 3>{}, with_nan, offsets);
      } else {
        fn(std::integral_constant<int, 0>{}, with_nan, offsets);
      }
    };
    const auto with_nan = [&](auto offsets) {
      if (nan) {
        with_size(std::true_type{}, offsets);
      } else {
        with_size(std::false_type{}, offsets);
      }
    };
    if (offsets_) {
      with_nan(std::true_type{});
    } else {
      with_nan(std::false_type{});
    }
  }

  // The columns of the tile and those around it into padded_. Returns whether one is NaN.
  bool stage(const S* row) {
    const int64_t unit = picture_->unit;
    const int64_t pixel = picture_->pixel_stride;
    T* const to = padded_ + (first_ - (tile_.left - reach_)) * unit;
    const S* const from = row + first_ * pixel;
    I nan{};
    if (unit == pixel) {
      nan = copy(from, (end_ - first_) * unit, to);
    } else {
      for (int64_t x = 0; x < end_ - first_; ++x) {
        prefetch(from + x * pixel + picture_->row_stride, unit);
        nan |= copy(from + x * pixel, unit, to + x * unit);
      }
    }
    return any_lane(nan);
  }

  void pad(int64_t at, int64_t count) {
    for (int64_t i = at; i < at + count; ++i) {
      padded_[i] = -std::numeric_limits<T>::infinity();
    }
  }

  // Returns in which lanes there was a NaN.
  static I copy(const S* from, int64_t count, T* to) {
    I nan{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const V v = load_as<V>(from + i);
      nan |= v != v;
      store(to + i, v);
    }
    if (i < count) {  // nothing beyond: there is padding
      const V v = load_part<V>(from + i, count - i);
      nan |= v != v;
      store_part(to + i, v, count - i);
    }
    return nan;
  }

  int size_;
  int64_t reach_;
  bool offsets_;
  int slots_ = 4;
  int64_t padded_size_;
  Buffer buffer_;
  T* padded_;
  T* best_[kMaxSlots];
  Int* code_[kMaxSlots];
  bool nan_[kMaxSlots];
  // Of the tile at work: its elements in a row, and the columns that its windows reach.
  const PoolPicture<S>* picture_ = nullptr;
  PoolTile tile_ = {};
  int64_t count_ = 0;
  int64_t first_ = 0;
  int64_t end_ = 0;
};

}  // namespace pydense::PYDENSE_ISA
