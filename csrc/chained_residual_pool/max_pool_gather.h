// SPDX-License-Identifier: Apache-2.0
// Backward of max pooling as a gather in two steps: what the windows of each column give to a row,
// then what the columns around a pixel give to it. Both follow the order in which forward found the
// maxima, and a sum has one order. Offsets are compared as bytes, a native vector at a time.
#pragma once

#include <array>
#include <bit>

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
  // Rows that go through a step together: the second one reads across what the first one writes,
  // and should find it written. More rows only if they are short: all that a batch touches stays
  // in the first cache beside what comes and goes.
  static constexpr int kBatch = 8;
  static constexpr int64_t kShort = 96;
  // Of these, rows whose sums are in registers at the same time.
  static constexpr int kTargets = kNativeBytes == 64 ? 2 : 1;
  static constexpr int kMaxSources = kMaxPoolSize - 1 + kBatch;
  static constexpr int kMaxSlots = std::bit_ceil(static_cast<unsigned>(kMaxSources));

  // A row of windows; a pixel's channels, or all of a row's pixels, lie together.
  struct Source {
    const T* grad;
    const uint8_t* offsets;
    int64_t step;  // from segment to segment of the offsets
  };

 public:
  // For tiles of at most `columns` columns and `unit` channels.
  PoolGather(const MaxPoolBackwardArgs& args, int64_t columns, int64_t unit)
      : args_(args),
        reach_(args.shape.size / 2),
        pixel_(args.shape.channels_last ? args.shape.channels : 1) {
    row_ = ((columns + 2 * reach_) * unit / kNativeBytes + 3) * kNativeBytes;
    batch_ = columns * unit > kShort ? kBatch / 2 : kBatch;
    sources_ = args.shape.size - 1 + batch_;
    slots_ = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(sources_)));
    const int64_t staged = std::is_same_v<S, T> ? 0 : slots_;
    // Two arrays of bytes fit into one of T.
    buffer_ = buffer_of<T>(static_cast<size_t>((2 * batch_ + staged) * row_));
    sum_ = buffer_.as<T>();
    for (int64_t j = 0; j < staged; ++j) {
      staged_[j] = sum_ + (batch_ + j) * row_;
    }
    column_ = reinterpret_cast<uint8_t*>(sum_ + (batch_ + staged) * row_);
    nowhere_ = column_ + batch_ * row_;
    std::memset(nowhere_, kNowhere, static_cast<size_t>(row_));
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
    set_borders(begin, before, behind, (tile.right - tile.left + 2 * reach_) * unit);
    int64_t next = larger(0, tile.top - reach_);
    for (int64_t top = tile.top; top < tile.bottom; top += batch_) {
      const int64_t bottom = smaller(top + batch_, tile.bottom);
      const int64_t below = smaller(shape.height, bottom + reach_);
      for (; next < below; ++next) {
        stage(grad, offsets, next, first);
      }
      Source sources[kMaxSources];
      const Source outside = {source_[slot_of(top)].grad, nowhere_, 0};
      for (int64_t i = 0; i < sources_; ++i) {
        const int64_t y = top - reach_ + i;
        sources[i] = y >= 0 && y < below ? source_[slot_of(y)] : outside;
      }
      const int64_t rows = bottom - top;
      if (shape.size == 5) {
        gather_rows<5>(sources, rows, begin + before);
      } else {
        gather_rows<0>(sources, rows, begin + before);
      }
      const int64_t to = at + (top * shape.width + tile.left) * pixel_;
      const int64_t columns = tile.right - tile.left;
      if (shape.size == 5 && kShifts<T> && unit == 1 && (begin + 2) % kLanes == 0) {
        gather_columns<5, true>(begin, to, unit, columns, rows);
      } else if (shape.size == 5) {
        gather_columns<5, false>(begin, to, unit, columns, rows);
      } else {
        gather_columns<0, false>(begin, to, unit, columns, rows);
      }
    }
  }

 private:
  int64_t slot_of(int64_t y) const { return y & (slots_ - 1); }

  // No window reaches the columns around the picture: before `before`, from `behind` to `end`. They
  // stay so from tile to tile, because what is written behind a row is no column either.
  void set_borders(int64_t begin, int64_t before, int64_t behind, int64_t end) {
    const std::array<int64_t, 4> borders = {begin, before, behind, end};
    if (borders == borders_) {
      return;
    }
    borders_ = borders;
    for (int64_t i = 0; i < batch_; ++i) {
      uint8_t* const row = column_ + begin + i * row_;
      std::memset(row, kNowhere, static_cast<size_t>(before));
      std::memset(row + behind, kNowhere, static_cast<size_t>(end - behind));
    }
  }

  // Row y of the gradient and of the offsets: where they are, or converted.
  void stage(const PoolPicture<S>& grad, const uint8_t* offsets, int64_t y, int64_t first) {
    const int64_t slot = slot_of(y);
    const S* const from = grad.from + y * grad.row_stride + first * pixel_;
    const uint8_t* const codes = offsets + (y * grad.width + first) * pixel_;
    for (int64_t s = 0; s < segments_ && segments_ > 1 && y + 1 < grad.height; ++s) {
      prefetch(from + grad.row_stride + s * pixel_, length_);
      prefetch(codes + (grad.width + s) * pixel_, length_);
    }
    if constexpr (std::is_same_v<S, T>) {
      source_[slot] = {from, codes, pixel_};
      grad_step_ = pixel_;
    } else {
      T* const to = staged_[slot];
      source_[slot] = {to, codes, pixel_};
      grad_step_ = length_;
      for (int64_t s = 0; s < segments_; ++s) {
        int64_t e = 0;
        for (; e + kLanes <= length_; e += kLanes) {
          store(to + s * length_ + e, load_as<V>(from + s * pixel_ + e));
        }
        if (e < length_) {
          store(to + s * length_ + e, load_part<V>(from + s * pixel_ + e, length_ - e));
        }
      }
    }
  }

  // Calls fn with constants.
  template <int Count, class Fn>
  static PYDENSE_HD void for_constants(const Fn& fn) {
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (fn(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, Count>{});
  }

  // sum_: what the windows of the columns in and around the tile give to a row. column_: to which
  // column of the window, a larger number where there is none.
  template <int K>
  [[gnu::noinline]] void gather_rows(Source* sources, int64_t rows, int64_t at) {
    constexpr int kTogether = K > 0 ? kTargets : 1;
    for (int64_t s = 0; s < segments_; ++s, at += length_) {
      for (int64_t y = 0; y < rows; y += kTogether) {
        const Source* const above = sources + y;
        const int64_t to = at + y * row_;
        int64_t e = 0;
        for (; e + kNativeBytes <= length_; e += kNativeBytes) {
          gather<K, kTogether, kParts, true>(above, e, kNativeBytes, to + e);
        }
        for (; e + kLanes <= length_; e += kLanes) {
          gather<K, kTogether, 1, true>(above, e, kLanes, to + e);
        }
        if (e < length_) {
          gather<K, kTogether, 1, false>(above, e, length_ - e, to + e);
        }
      }
      for (int64_t i = 0; i < sources_ && segments_ > 1; ++i) {
        sources[i].grad += grad_step_;
        sources[i].offsets += sources[i].step;
      }
    }
  }

  // The windows in the row of source i hold rows i - (K - 1) to i of the targets.
  template <int K, int Targets, int Parts, bool Whole>
  PYDENSE_HD void gather(const Source* sources, int64_t e, int64_t count, int64_t at) {
    const int size = K > 0 ? K : args_.shape.size;
    V sum[Targets][Parts] = {};
    ByteVec column[Targets];
    for (int t = 0; t < Targets; ++t) {
      column[t] = ByteVec{} + kNowhere;
    }
    const auto add_source = [&](auto i) {
      const uint8_t* const codes = sources[i].offsets + e;
      const T* const grad = sources[i].grad + e;
      const auto code = [&] {
        if constexpr (Parts == kParts) {
          return PartBytes<V, Parts>(codes);
        } else {
          return PartBytes<V, Parts>(load_first_bytes<kLanes>(codes, count, kNowhere));
        }
      }();
      const auto row = code & static_cast<uint8_t>(256 - kPoolColumns);
      V own[Parts];
      for (int p = 0; p < Parts; ++p) {
        own[p] = Whole ? load<V>(grad + p * kLanes) : load_part<V>(grad, count);
      }
      for_constants<Targets>([&](auto t) {
        if (i >= t && i - t < size) {
          const auto mine = row.equal(static_cast<uint8_t>((size - 1 - (i - t)) << kPoolRowBits));
          column[t] = mine.choose(code.whole(), column[t]);
          for_constants<Parts>(
              [&](auto p) { sum[t][p] = mine.template add<p>(sum[t][p], own[p]); });
        }
      });
    };
    if constexpr (K > 0) {
      for_constants<K - 1 + Targets>(add_source);
    } else {
      for (int i = 0; i < size; ++i) {
        add_source(i);
      }
    }
    for (int t = 0; t < Targets; ++t) {
      for (int p = 0; p < Parts; ++p) {
        store(sum_ + at + t * row_ + p * kLanes, sum[t][p]);
      }
      store(column_ + at + t * row_, column[t] & uint8_t{kPoolColumns - 1});
    }
  }

  // Rows of the result from a batch of sums, whose first one begins at `from`.
  template <int K, bool Shifts>
  [[gnu::noinline]] void gather_columns(int64_t from, int64_t at, int64_t unit, int64_t columns,
                                        int64_t rows) {
    const bool together = Shifts || unit == pixel_;
    const int64_t segments = together ? 1 : columns;
    const int64_t length = together ? columns * unit : unit;
    const int64_t pixel = pixel_;
    const int64_t stride = args_.shape.width * pixel;
    const int64_t row = row_;
    const T* sums = sum_ + from;
    const uint8_t* places = column_ + from;
    S* to = static_cast<S*>(args_.result) + at;
    const S* addend = args_.addend == nullptr ? nullptr : static_cast<const S*>(args_.addend) + at;
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t s = 0; s < segments; ++s) {
        const T* const sum = sums + s * length;
        const uint8_t* const place = places + s * length;
        gather_segment<K, Shifts>(sum, place, unit, length, to + s * pixel,
                                  addend == nullptr ? nullptr : addend + s * pixel);
      }
      sums += row;
      places += row;
      to += stride;
      addend = addend == nullptr ? nullptr : addend + stride;
    }
  }

  template <int K, bool Shifts>
  PYDENSE_HD void gather_segment(const T* sums, const uint8_t* places, int64_t unit, int64_t length,
                                 S* to, const S* addend) const {
    int64_t e = 0;
    for (; e + kNativeBytes <= length; e += kNativeBytes) {
      V total[kParts];
      if constexpr (Shifts) {
        collect_shifted(sums + e, places + e, total);
      } else {
        collect<K, kParts>(sums + e, places + e, unit, total);
      }
      if (addend != nullptr) {
#pragma GCC unroll 8
        for (int p = 0; p < kParts; ++p) {
          total[p] += load_as<V>(addend + e + p * kLanes);
        }
      }
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) {
        store_as(to + e + p * kLanes, total[p]);
      }
    }
    for (; e < length; e += kLanes) {
      V total[1];
      collect<K, 1>(sums + e, places + e, unit, total);
      const int64_t left = smaller(length - e, kLanes);
      if (addend != nullptr) {
        total[0] += load_part<V>(addend + e, left);
      }
      store_part(to + e, total[0], left);
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
    for_constants<kParts>([&](auto p) {
      const uint8_t* const own_places = places + p * kLanes;
      const V& before = here[p];
      const V& own = here[p + 1];
      const V& after = here[p + 2];
      sum[p] = V{};
      const auto add = [&](auto j, const V& term) {
        sum[p] =
            PartBytes<V, 1>(own_places + j).equal(uint8_t{4 - j}).template add<0>(sum[p], term);
      };
      add(std::integral_constant<int, 0>{}, lanes_from<kLanes - 2>(before, own));
      add(std::integral_constant<int, 1>{}, lanes_from<kLanes - 1>(before, own));
      add(std::integral_constant<int, 2>{}, own);
      add(std::integral_constant<int, 3>{}, lanes_from<1>(own, after));
      add(std::integral_constant<int, 4>{}, lanes_from<2>(own, after));
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
      const auto mine = PartBytes<V, Parts>(places + e).equal(static_cast<uint8_t>(size - 1 - j));
      for_constants<Parts>(
          [&](auto p) { sum[p] = mine.template add<p>(sum[p], load<V>(sums + e + p * kLanes)); });
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
  int64_t batch_;
  int64_t sources_;  // rows of windows that hold a batch
  int64_t slots_;    // a power of two that is enough for them
  uint8_t* nowhere_;
  std::array<int64_t, 4> borders_ = {};
  T* staged_[kMaxSlots] = {};
  Source source_[kMaxSlots] = {};
};

}  // namespace pydense::PYDENSE_ISA
