// SPDX-License-Identifier: Apache-2.0
// Backward, one input and one plane at a time: rows of the output's gradient come in from the top,
// rows of the input's gradient go out. Each number of the output's gradient is read once. Rows
// between the same two rows of the input are summed first, vertically, in registers.
//
// GatherRows serves one channel, GatherPixels some channels of a channels_last picture; here is
// what both need.
#pragma once

#include "common/simd.h"
#include "upsample/upsample_cpu.h"

namespace pydense::PYDENSE_ISA {

// Rows that are summed at once, their weights in registers. With more, the caches' ways and the
// prefetchers would run out too.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowsAtOnce = 8;
#else
constexpr int kRowsAtOnce = 4;
#endif

// Several rows side by side are more than what the hardware follows: how many rows further on (a
// multiple of `rows`) to ask for, some KB ahead.
PYDENSE_HD int64_t rows_ahead(int64_t rows, int64_t row_bytes) {
  constexpr int64_t kBytes = 8192;
  return ceil_div(kBytes, larger(rows * row_bytes, 1)) * rows;
}

// The same along a row: elements, of whole pixels of `pitch` elements each.
template <class S>
PYDENSE_HD int64_t elements_ahead(int64_t pitch) {
  return rows_ahead(1, pitch * static_cast<int64_t>(sizeof(S))) * pitch;
}

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

// The weights of some output rows for their two taps; for one tap, what both add up to.
template <class T, int Rows>
struct RowWeights {
  using V = Vec<T, kNativeLanesOf<T>>;
  V own[Rows];
  V next[Rows];

  PYDENSE_HD RowWeights(const AxisTable<T>& axis, int64_t y, bool both) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      own[i] = broadcast<V>(both ? axis.w0[y + i] : axis.w0[y + i] + axis.w1[y + i]);
      next[i] = broadcast<V>(both ? axis.w1[y + i] : T{});
    }
  }
};

}  // namespace pydense::PYDENSE_ISA
