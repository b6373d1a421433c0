// SPDX-License-Identifier: Apache-2.0
// Rows of maps that are shifted by a tap, for what reads and what writes them.
#pragma once

#include "common/partial.h"

namespace pydense::PYDENSE_ISA {

// The elements x of a row of `width` for which x + shift is one too, within [left, right).
struct Overlap {
  int64_t begin;
  int64_t end;
};
PYDENSE_HD Overlap overlap(int64_t shift, int64_t width, int64_t left, int64_t right) {
  // A shift beyond the row may be too large to be added.
  if (shift >= width || shift <= -width) {
    return {left, left};
  }
  const int64_t begin = larger(left, -shift);
  return {begin, larger(begin, smaller(right, width - shift))};
}

// From where a tap writes to where it reads, without overflow.
PYDENSE_HD int64_t shift_back(int64_t shift) { return shift == INT64_MIN ? INT64_MAX : -shift; }

template <class S, class M>
PYDENSE_HD void copy_row(const S* from, int64_t count, M* to) {
  if constexpr (std::is_same_v<S, M>) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(S));
  } else {
    using V = Vec<M, kNativeLanesOf<M>>;
    constexpr int64_t kLanes = kLanesIn<V>;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(to + i, load_as<V>(from + i));
    }
    for (; i < count; ++i) {
      to[i] = load_as<M>(from + i);
    }
  }
}

// Columns [left, right) of row y of a plane that is shifted: to[x - left] = from(y + dy, x + dx),
// 0 where that lies beside the plane.
template <class S, class M>
PYDENSE_HD void copy_shifted(const S* from, int64_t height, int64_t width, int64_t dy, int64_t dx,
                             int64_t y, int64_t left, int64_t right, M* to) {
  const Overlap rows = overlap(dy, height, y, y + 1);
  const Overlap columns = overlap(dx, width, left, right);
  const bool inside = rows.begin == y && rows.end > y && columns.end > columns.begin;
  const int64_t begin = inside ? columns.begin : right;
  const int64_t end = inside ? columns.end : right;
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(begin - left) * sizeof(M));
  if (inside) {
    copy_row(from + (y + dy) * width + begin + dx, end - begin, to + begin - left);
  }
  std::memset(static_cast<void*>(to + end - left), 0, static_cast<size_t>(right - end) * sizeof(M));
}

}  // namespace pydense::PYDENSE_ISA
