// SPDX-License-Identifier: Apache-2.0
// Backward of max pooling as a gather in two steps: what the windows of each column give to a row,
// then what the columns around a pixel give to it. Both follow the order in which forward found the
// maxima, and a sum has one order. Offsets are compared as bytes, a native vector at a time.
#pragma once

#include "chained_residual_pool/max_pool_tile.h"
#include "common/byte_mask.h"

namespace pydense::PYDENSE_ISA {

template <class S>
class PoolGather {
  using T = ComputeOf<S>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  static constexpr int kParts = kNativeBytes / kLanes;
  using V = Vec<T, kLanes>;
  static constexpr uint8_t kNowhere = 255;
  static constexpr int kSlots = 16;
  // Rows that go through a step together: the second one reads across what the first one writes,
  // and should find it written.
  static constexpr int kBatch = 4;

  // The rows whose windows hold a row; a pixel's channels, or all of a row's pixels, lie together.
  struct Rows {
    const T* grad[kMaxPoolSize];
    const uint8_t* offsets[kMaxPoolSize];
    int count;
    int first;  // what the offsets of the first one to this row begin with
  };

 public:
  // For tiles of at most `columns` columns and `unit` channels.
  PoolGather(const MaxPoolBackwardArgs& args, int64_t columns, int64_t unit)
      : args_(args),
        reach_(args.shape.size / 2),
        pixel_(args.shape.channels_last ? args.shape.channels : 1) {
    row_ = ((columns + 2 * reach_) * unit / kNativeBytes + 3) * kNativeBytes;
    const int64_t staged = std::is_same_v<S, T> ? 0 : kSlots;
    buffer_ = buffer_of<T>(static_cast<size_t>((2 * kBatch + staged) * row_));
    sum_ = buffer_.as<T>();
    for (int j = 0; j < staged; ++j) {
      staged_[j] = sum_ + (kBatch + j) * row_;
    }
    column_ = reinterpret_cast<uint8_t*>(sum_ + (kBatch + staged) * row_);
  }

  // `from`: the first of the channels' offsets, at row 0 and column 0; `at` as far into the result.
  void run(const PoolPicture<S>& grad, int64_t at, const PoolTile& tile) {
    const PoolShape& shape = args_.shape;
    const uint8_t* const offsets = args_.offsets + at;
    const int64_t unit = grad.unit;
    const int64_t first = larger(0, tile.left - reach_);
    const int64_t end = smaller(shape.width, tile.right + reach_);
    const int64_t before = (first - (tile.left - reach_)) * unit;
    const int64_t behind = before + (end - first) * unit;
    const bool together = unit == pixel_;
    segments_ = together ? 1 : end - first;
    length_ = together ? (end - first) * unit : unit;
    // What the first step writes is aligned.
    const int64_t begin = (kNativeBytes - before % kNativeBytes) % kNativeBytes;
    for (int64_t i = 0; i < kBatch; ++i) {
      std::memset(column_ + begin + i * row_, kNowhere, static_cast<size_t>(before));
    }
    int64_t next = larger(0, tile.top - reach_);
    for (int64_t top = tile.top; top < tile.bottom; top += kBatch) {
      const int64_t bottom = smaller(top + kBatch, tile.bottom);
      for (int64_t y = top; y < bottom; ++y) {
        Rows rows;
        const int64_t above = larger(0, y - reach_);
        const int64_t below = smaller(shape.height, y + reach_ + 1);
        for (; next < below; ++next) {
          stage(grad, offsets, next, first);
        }
        rows.count = static_cast<int>(below - above);
        rows.first = static_cast<int>(y - above + reach_);
        for (int j = 0; j < rows.count; ++j) {
          const int slot = static_cast<int>((above + j) % kSlots);
          rows.grad[j] = grad_[slot];
          rows.offsets[j] = offsets_[slot];
        }
        const int64_t own = begin + (y - top) * row_;
        if (shape.size == 5 && rows.count == 5) {
          gather_rows<5>(rows, own + before);
        } else {
          gather_rows<0>(rows, own + before);
        }
        std::memset(column_ + own + behind, kNowhere,
                    static_cast<size_t>((tile.right + reach_ - end) * unit));
      }
      const int64_t to = at + (top * shape.width + tile.left) * pixel_;
      const int64_t columns = tile.right - tile.left;
      if (shape.size == 5 && args_.addend == nullptr) {
        gather_columns<5, false>(begin, to, unit, columns, bottom - top);
      } else if (shape.size == 5) {
        gather_columns<5, true>(begin, to, unit, columns, bottom - top);
      } else if (args_.addend == nullptr) {
        gather_columns<0, false>(begin, to, unit, columns, bottom - top);
      } else {
        gather_columns<0, true>(begin, to, unit, columns, bottom - top);
      }
    }
  }

 private:
  // Row y of the gradient and of the offsets: where they are, or converted.
  void stage(const PoolPicture<S>& grad, const uint8_t* offsets, int64_t y, int64_t first) {
    const int slot = static_cast<int>(y % kSlots);
    const S* const from = grad.from + y * grad.row_stride + first * pixel_;
    offsets_[slot] = offsets + (y * grad.width + first) * pixel_;
    for (int64_t s = 0; s < segments_ && segments_ > 1 && y + 1 < grad.height; ++s) {
      prefetch(from + grad.row_stride + s * pixel_, length_);
      prefetch(offsets_[slot] + (grad.width + s) * pixel_, length_);
    }
    if constexpr (std::is_same_v<S, T>) {
      grad_[slot] = from;
      grad_step_ = pixel_;
    } else {
      grad_[slot] = staged_[slot];
      grad_step_ = length_;
      for (int64_t s = 0; s < segments_; ++s) {
        int64_t e = 0;
        for (; e + kLanes <= length_; e += kLanes) {
          store(staged_[slot] + s * length_ + e, load_as<V>(from + s * pixel_ + e));
        }
        if (e < length_) {
          store(staged_[slot] + s * length_ + e, load_part<V>(from + s * pixel_ + e, length_ - e));
        }
      }
    }
  }

  // Calls fn with constants.
  template <int Parts, class Fn>
  static PYDENSE_HD void for_parts(const Fn& fn) {
    [&]<int... P>(std::integer_sequence<int, P...>) {
      (fn(std::integral_constant<int, P>{}), ...);
    }(std::make_integer_sequence<int, Parts>{});
  }

  // sum_: what the windows of the columns in and around the tile give to a row. column_: to which
  // column of the window, kNowhere where there is none.
  template <int K>
  [[gnu::noinline]] void gather_rows(const Rows& rows, int64_t at) {
    for (int64_t s = 0; s < segments_; ++s, at += length_) {
      int64_t e = 0;
      for (; e + kNativeBytes <= length_; e += kNativeBytes) {
        gather<K, kParts, true>(rows, s, e, kNativeBytes, at + e);
      }
      for (; e + kLanes <= length_; e += kLanes) {
        gather<K, 1, true>(rows, s, e, kLanes, at + e);
      }
      if (e < length_) {
        gather<K, 1, false>(rows, s, e, length_ - e, at + e);
      }
    }
  }

  template <int K, int Parts, bool Whole>
  PYDENSE_HD void gather(const Rows& rows, int64_t segment, int64_t e, int64_t count, int64_t at) {
    const int num_rows = K > 0 ? K : rows.count;
    V sum[Parts] = {};
    ByteVec column = ByteVec{} + kNowhere;
#pragma GCC unroll 5
    for (int j = 0; j < num_rows; ++j) {
      const uint8_t* const codes = rows.offsets[j] + segment * pixel_ + e;
      const T* const grad = rows.grad[j] + segment * grad_step_ + e;
      ByteVec code{};
      if constexpr (Parts == kParts) {
        code = load<ByteVec>(codes);
      } else {
        code = load_first_bytes<kLanes>(codes, count);
      }
      // Of offsets to this row only the column is left, below 16. Whole windows begin with K - 1.
      code ^= static_cast<uint8_t>(((K > 0 ? K - 1 : rows.first) - j) << kPoolRowBits);
      const ByteMask mine = ByteMask::less(code, 16);
      column = mine.choose(code, column);
      for_parts<Parts>([&](auto p) {
        const V own = Whole ? load<V>(grad + p * kLanes) : load_part<V>(grad, count);
        sum[p] = mine.template add<p * kLanes>(sum[p], own);
      });
    }
#pragma GCC unroll 8
    for (int p = 0; p < Parts; ++p) {
      store(sum_ + at + p * kLanes, sum[p]);
    }
    store(column_ + at, column);
  }

  // Rows of the result from a batch of sums, whose first one begins at `from`.
  template <int K, bool Add>
  [[gnu::noinline]] void gather_columns(int64_t from, int64_t at, int64_t unit, int64_t columns,
                                        int64_t rows) {
    const T* const sums = sum_;
    const uint8_t* const places = column_;
    const bool together = unit == pixel_;
    const int64_t segments = together ? 1 : columns;
    const int64_t length = together ? columns * unit : unit;
    [[maybe_unused]] const bool shifts = together && unit == 1 && (from + 2) % kLanes == 0;
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t s = 0; s < segments; ++s) {
        const T* const sum = sums + from + y * row_ + s * length;
        const uint8_t* const place = places + from + y * row_ + s * length;
        const int64_t first = at + y * args_.shape.width * pixel_ + s * pixel_;
        S* const to = static_cast<S*>(args_.result) + first;
        const S* const addend = Add ? static_cast<const S*>(args_.addend) + first : nullptr;
        int64_t e = 0;
        for (; e + kNativeBytes <= length; e += kNativeBytes) {
          V total[kParts];
          if constexpr (K == 5 && kShifts<T>) {
            if (shifts) {
              collect_shifted(sum + e, place + e, total);
            } else {
              collect<K, kParts>(sum + e, place + e, unit, total);
            }
          } else {
            collect<K, kParts>(sum + e, place + e, unit, total);
          }
#pragma GCC unroll 8
          for (int p = 0; p < kParts; ++p) {
            const int64_t i = e + int64_t{p} * kLanes;
            store_as(to + i, Add ? total[p] + load_as<V>(addend + i) : total[p]);
          }
        }
        for (; e < length; e += kLanes) {
          V total[1];
          collect<K, 1>(sum + e, place + e, unit, total);
          const int64_t left = length - e;
          if (left >= kLanes) {
            store_as(to + e, Add ? total[0] + load_as<V>(addend + e) : total[0]);
          } else {
            store_part(to + e, Add ? total[0] + load_part<V>(addend + e, left) : total[0], left);
          }
        }
      }
    }
  }

  // The same for windows of 5 and neighbouring pixels, whose sums are shifted out of aligned
  // vectors.
  static PYDENSE_HD void collect_shifted(const T* sums, const uint8_t* places, V* sum) {
    V here[kParts + 2];
#pragma GCC unroll 10
    for (int p = 0; p < kParts + 2; ++p) {
      here[p] = load<V>(sums + 2 + (p - 1) * kLanes);
    }
    const auto mine_at = [&](int j) {
      return ByteMask::equal(load<ByteVec>(places + j), static_cast<uint8_t>(4 - j));
    };
    const ByteMask mine[] = {mine_at(0), mine_at(1), mine_at(2), mine_at(3), mine_at(4)};
    for_parts<kParts>([&](auto p) {
      constexpr int kBytes = p * kLanes;
      const V& before = here[p];
      const V& own = here[p + 1];
      const V& after = here[p + 2];
      V s = mine[0].template add<kBytes>(V{}, lanes_from<kLanes - 2>(before, own));
      s = mine[1].template add<kBytes>(s, lanes_from<kLanes - 1>(before, own));
      s = mine[2].template add<kBytes>(s, own);
      s = mine[3].template add<kBytes>(s, lanes_from<1>(own, after));
      sum[p] = mine[4].template add<kBytes>(s, lanes_from<2>(own, after));
    });
  }

  template <int K, int Parts>
  PYDENSE_HD void collect(const T* sums, const uint8_t* places, int64_t unit, V* sum) const {
    const int size = K > 0 ? K : args_.shape.size;
    for (int p = 0; p < Parts; ++p) {
      sum[p] = V{};
    }
#pragma GCC unroll 5
    for (int j = 0; j < size; ++j) {
      const int64_t e = j * unit;
      const ByteMask mine =
          ByteMask::equal(load<ByteVec>(places + e), static_cast<uint8_t>(size - 1 - j));
      for_parts<Parts>([&](auto p) {
        sum[p] = mine.template add<p * kLanes>(sum[p], load<V>(sums + e + p * kLanes));
      });
    }
  }

  const MaxPoolBackwardArgs& args_;
  int64_t reach_;
  int64_t pixel_;         // elements from pixel to pixel
  int64_t row_ = 0;       // of sum_ and column_
  int64_t segments_ = 0;  // of a row: its elements that lie together, and how many
  int64_t length_ = 0;
  int64_t grad_step_ = 0;  // from segment to segment
  Buffer buffer_;
  T* sum_;
  uint8_t* column_;
  T* staged_[kSlots] = {};
  const T* grad_[kSlots] = {};
  const uint8_t* offsets_[kSlots] = {};
};

}  // namespace pydense::PYDENSE_ISA
