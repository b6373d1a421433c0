// SPDX-License-Identifier: Apache-2.0
// Forward, horizontally: from a row of an input to the columns of the output.
#pragma once

#include "common/simd.h"
#include "upsample/upsample_cpu.h"

namespace pydense::PYDENSE_ISA {

// Columns [x, x + lanes) of the output come from the columns of the input after base0 and base1:
// within one, two or four vectors, or else (0) from anywhere.
struct Block {
  int32_t x;
  int32_t base0;
  int32_t base1;
  int32_t vectors;
};
constexpr int kMaxVectors = 4;

// The columns [begin, end) of the output that are done in one go.
struct Tile {
  int64_t begin;
  int64_t end;
};

template <class T>
class Spread {
 public:
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;

  // The table of one tile.
  Spread(const AxisTable<T>& x, const Tile& tile, bool with_blocks)
      : x_(x),
        tile_(tile),
        begin_(smaller(larger(tile.begin, x.begin), tile.end)),
        end_(larger(smaller(tile.end, x.end), begin_)),
        first_(begin_ < end_ ? x.i0[begin_] : 0),
        count_(begin_ < end_ ? x.i1[end_ - 1] - first_ + 1 : 0) {
    if (!with_blocks || end_ - begin_ < kLanes) {
      return;
    }
    num_blocks_ = ceil_div(end_ - begin_, kLanes);
    blocks_buffer_ = buffer_of<Block>(static_cast<size_t>(num_blocks_));
    index_buffer_ = buffer_of<IntOf<T>>(static_cast<size_t>(2 * num_blocks_ * kLanes));
    for (int64_t b = 0; b < num_blocks_; ++b) {
      // The last one overlaps the one before.
      const int64_t at = smaller(begin_ + b * kLanes, end_ - kLanes);
      Block& block = blocks()[b];
      block = {static_cast<int32_t>(at), x.i0[at], x.i1[at], 0};
      int32_t span = 1;
      for (int l = 0; l < kLanes; ++l) {
        const int32_t lane0 = x.i0[at + l] - block.base0;
        const int32_t lane1 = x.i1[at + l] - block.base1;
        span = lane0 < span ? span : lane0 + 1;
        span = lane1 < span ? span : lane1 + 1;
        index()[2 * b * kLanes + l] = lane0;
        index()[(2 * b + 1) * kLanes + l] = lane1;
      }
      block.vectors = span <= kLanes ? 1 : span <= 2 * kLanes ? 2 : span <= 4 * kLanes ? 4 : 0;
      if (num_narrow_ == b && block.vectors == 1 && block.base1 + kLanes <= x.in_size) {
        ++num_narrow_;
      }
    }
    staged_ = num_narrow_ < num_blocks_ ? blocks()[num_narrow_].base0 - first_ : count_;
  }

  // What is needed of a row of the input.
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  // From this column after the first on, row() reads `staged`.
  int64_t staged() const { return staged_; }

  // to[x - tile.begin] for one channel. `from` starts at column first() of a row of the input, of
  // which vectors are read as far as it reaches, and so does `staged`,
  // which has kMaxVectors * kLanes columns more than count(). Columns that no input reaches are not
  // touched. Asks memory for what is `ahead` of `from`.
  void row(const T* from, int64_t ahead, const T* staged, T* to) const {
    from -= first_;
    staged -= first_;
    to -= tile_.begin;
    if (num_blocks_ == 0) {
      return columns(staged, to, begin_, end_);
    }
    const IntOf<T>* lanes = index();
    const T* const w0 = x_.w0;
    const T* const w1 = x_.w1;
    const Block* at = blocks();
    for (const Block* const end = at + num_narrow_; at < end; ++at, lanes += 2 * kLanes) {
      const Block block = *at;
      __builtin_prefetch(from + block.base0 + ahead);
      const V left = permute(load<V>(from + block.base0), load<I>(lanes));
      const V right = permute(load<V>(from + block.base1), load<I>(lanes + kLanes));
      store(to + block.x, fma(load<V>(w1 + block.x), right, load<V>(w0 + block.x) * left));
    }
    for (const Block* const end = blocks() + num_blocks_; at < end; ++at, lanes += 2 * kLanes) {
      const Block block = *at;
      if (block.vectors == 0) {
        columns(staged, to, block.x, block.x + kLanes);
        continue;
      }
      const V left = pick(staged + block.base0, load<I>(lanes), block.vectors);
      const V right = pick(staged + block.base1, load<I>(lanes + kLanes), block.vectors);
      store(to + block.x, fma(load<V>(w1 + block.x), right, load<V>(w0 + block.x) * left));
    }
  }

  // The same for pixels of `channels` each; below kLanes channels `from` and `to` have kLanes
  // elements to spare.
  void pixels(const T* from, T* to, int64_t channels) const {
    from -= first_ * channels;
    to -= tile_.begin * channels;
    const int64_t last = channels - kLanes;
    for (int64_t x = begin_; x < end_; ++x) {
      const T* const a = from + x_.i0[x] * channels;
      const T* const b = from + x_.i1[x] * channels;
      T* const out = to + x * channels;
      const V w0 = broadcast<V>(x_.w0[x]);
      const V w1 = broadcast<V>(x_.w1[x]);
      int64_t c = 0;
      for (; c < last; c += kLanes) {
        store(out + c, fma(w1, load<V>(b + c), w0 * load<V>(a + c)));
      }
      c = last > 0 ? last : 0;
      store(out + c, fma(w1, load<V>(b + c), w0 * load<V>(a + c)));
    }
    if (last < 0 && end_ < tile_.end) {  // what the last pixel wrote too much
      std::memset(to + end_ * channels, 0, kLanes * sizeof(T));
    }
  }

 private:
  static PYDENSE_HD V pick(const T* from, const I& index, int32_t vectors) {
    if (vectors == 1) {
      return permute(load<V>(from), index);
    }
    const V near = permute(load<V>(from), load<V>(from + kLanes), index);
    if (vectors == 2) {
      return near;
    }
    const V far = permute(load<V>(from + 2 * kLanes), load<V>(from + 3 * kLanes), index);
    return index < 2 * kLanes ? near : far;  // permute looks at the low bits of an index alone
  }
  void columns(const T* from, T* to, int64_t begin, int64_t end) const {
    for (int64_t x = begin; x < end; ++x) {
      to[x] = fma(x_.w1[x], from[x_.i1[x]], x_.w0[x] * from[x_.i0[x]]);
    }
  }
  Block* blocks() const { return blocks_buffer_.as<Block>(); }
  IntOf<T>* index() const { return index_buffer_.as<IntOf<T>>(); }

  const AxisTable<T>& x_;
  Tile tile_;
  int64_t begin_;  // of the columns that inputs reach
  int64_t end_;
  int64_t first_;
  int64_t count_;
  int64_t num_blocks_ = 0;
  int64_t num_narrow_ = 0;  // the first ones, which read one vector, inside the row
  int64_t staged_ = 0;
  Buffer blocks_buffer_;
  Buffer index_buffer_;
};

}  // namespace pydense::PYDENSE_ISA
