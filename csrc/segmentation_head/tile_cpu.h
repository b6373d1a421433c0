// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of this room share: source rows as dense arrays of T, and the interpolation
// between their columns, a vector of outputs at a time.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/buffer.h"
#include "common/half.h"
#include "common/simd_lanes.h"
#include "common/with_constant.h"
#include "segmentation_head/segmentation_head.h"

namespace pydense::PYDENSE_ISA {

template <class T>
using LaneInt = std::make_signed_t<BitsOf<T>>;

PYDENSE_HD int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// to[c * to_stride + x] = logits[image, c, y, first + x] for x in [0, count).
template <class T, class S>
void load_source(const LogitsView& logits, int64_t image, int64_t y, int64_t first, int64_t count,
                 T* to, int64_t to_stride) {
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  const int64_t class_stride = logits.strides[1];
  const int64_t stride = logits.strides[3];
  const S* const from = static_cast<const S*>(logits.data) + image * logits.strides[0] +
                        y * logits.strides[2] + first * stride;
  if (stride == 1) {
    for (int64_t c = 0; c < logits.classes; ++c) {
      int64_t x = 0;
      for (; x + kLanes <= count; x += kLanes) {
        __builtin_prefetch(from + c * class_stride + x + logits.strides[2]);
        store(to + c * to_stride + x, load_as<V>(from + c * class_stride + x));
      }
      for (; x < count; ++x) {
        to[c * to_stride + x] = load_as<T>(from + c * class_stride + x);
      }
    }
    return;
  }
  int64_t c = 0;
  for (; class_stride == 1 && c + kLanes <= logits.classes; c += kLanes) {
    int64_t x = 0;
    for (; x + kLanes <= count; x += kLanes) {
      V block[kLanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) {
        block[k] = load_as<V>(from + (x + k) * stride + c);
      }
      transpose_square(block);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) {
        store(to + (c + k) * to_stride + x, block[k]);
      }
    }
    for (; x < count; ++x) {
      for (int64_t k = c; k < c + kLanes; ++k) {
        to[k * to_stride + x] = load_as<T>(from + x * stride + k);
      }
    }
  }
  for (; c < logits.classes; ++c) {
    for (int64_t x = 0; x < count; ++x) {
      to[c * to_stride + x] = load_as<T>(from + x * stride + c * class_stride);
    }
  }
}
template <class T>
void load_source(const LogitsView& logits, int64_t image, int64_t y, int64_t first, int64_t count,
                 T* to, int64_t to_stride) {
  if constexpr (sizeof(T) == 8) {
    return load_source<T, double>(logits, image, y, first, count, to, to_stride);
  } else {
    switch (logits.type) {
      case FloatType::kBFloat16:
        return load_source<T, BFloat16>(logits, image, y, first, count, to, to_stride);
      case FloatType::kFloat16:
        return load_source<T, Half>(logits, image, y, first, count, to, to_stride);
      default:
        return load_source<T, float>(logits, image, y, first, count, to, to_stride);
    }
  }
}

// The taps of kLanes outputs along x. Where they lie within one vector of sources (in all but a few
// blocks of scales above 1), a load and two permutations bring them; else they are gathered one by
// one.
template <class T>
struct ColumnBlock {
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using Int = Vec<LaneInt<T>, kLanes>;

  V w0;
  V w1;
  Int i0;  // from first
  Int i1;
  int64_t first;
  bool near;

  // The left and the right tap in any row of values as wide as T.
  template <class W>
  struct Taps {
    W left;
    W right;
  };
  template <class W, class U>
  PYDENSE_HD Taps<W> taps(const U* row) const {
    if (near) {
      const W sources = load<W>(row + first);
      return {permute(sources, i0), permute(sources, i1)};
    }
    W left = {};
    W right = {};
    for (int l = 0; l < kLanes; ++l) {
      left[l] = row[first + i0[l]];
      right[l] = row[first + i1[l]];
    }
    return {left, right};
  }
  PYDENSE_HD V interpolate(const T* row) const {
    const Taps<V> at = taps<V>(row);
    return fma(w1, at.right, w0 * at.left);
  }
};

// The outputs [begin, end) along x and the sources they need, [first, first + sources).
template <class T>
class ColumnTile {
 public:
  using Block = ColumnBlock<T>;
  static constexpr int kLanes = Block::kLanes;

  ColumnTile(const AxisTable<T>& x, int64_t begin, int64_t end)
      : begin_(begin),
        end_(end),
        first_(x.i0[begin]),
        sources_(x.i1[end - 1] + 1 - first_),
        blocks_(buffer_of<Block>(static_cast<size_t>(count()))) {
    for (int64_t b = 0; b < count(); ++b) {
      const int64_t at = begin + b * kLanes;
      Block& block = blocks_.template as<Block>()[b];
      block.w0 = load<typename Block::V>(x.w0 + at);
      block.w1 = load<typename Block::V>(x.w1 + at);
      block.first = x.i0[at] - first_;
      block.near = true;
      for (int l = 0; l < kLanes; ++l) {
        // Lanes past the end repeat its taps: what they compute is finite where the last output is.
        const int64_t k = std::min<int64_t>(at + l, end - 1);
        block.i0[l] = x.i0[k] - first_ - block.first;
        block.i1[l] = x.i1[k] - first_ - block.first;
        block.near = block.near && block.i1[l] < kLanes;
      }
    }
  }

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  int64_t first_source() const { return first_; }
  int64_t sources() const { return sources_; }
  // Of a row of sources in memory: whole vectors may be read from anywhere in it.
  int64_t source_stride() const { return round_up(sources_, kLanes) + kLanes; }
  int64_t count() const { return (end_ - begin_ + kLanes - 1) / kLanes; }
  const Block& block(int64_t b) const { return blocks_.template as<Block>()[b]; }

 private:
  int64_t begin_;
  int64_t end_;
  int64_t first_;
  int64_t sources_;
  Buffer blocks_;
};

}  // namespace pydense::PYDENSE_ISA
