// SPDX-License-Identifier: Apache-2.0
// Products of large matrices by blocks that caches hold: a block of B's columns, packed for all of
// the depth, stays in the second-level cache, and panels of A pass by from wherever they lie, each
// in parts that the first level holds. What a panel makes of the block is complete at once: it is
// handed on from the first-level cache, and nothing is added up in memory.
//
// The depth is cut into parts, each a chain of multiply-adds (gemm.h), and the sums of parts are
// added in order: numbers are the same for any blocks, and so for any number of threads, and their
// error is that of short chains.
#pragma once

#include "common/gemm/gemm.h"
#include "common/parallel.h"
#include "common/simd_lanes.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kGemmBlockBytes = 512 << 10;  // of B
constexpr int64_t kGemmPartDepth = 128;         // of a panel of A, whole steps
constexpr int64_t kGemmMaxColumns = 512;        // of a block

// Columns of a block, whole panels of them.
template <class P>
constexpr int64_t gemm_block_columns(int64_t depth) {
  const int64_t panel =
      gemm_depth<P>(larger(1, depth)) * kGemmColumns<P> * static_cast<int64_t>(sizeof(P));
  const int64_t most = kGemmMaxColumns / kGemmColumns<P>;
  return smaller(most, larger(1, kGemmBlockBytes / panel)) * kGemmColumns<P>;
}

// Numbers between the rows of what a panel makes of a block.
template <class P>
constexpr int64_t gemm_tile_row(int64_t columns) {
  return gemm_panels(columns, kGemmColumns<P>) * kGemmColumns<P>;
}

// to += from, Rows x kGemmColumns.
template <class P>
PYDENSE_HD void gemm_add_tile(int64_t rows, const ComputeOf<P>* from, ComputeOf<P>* to,
                              int64_t to_row) {
  using V = Vec<ComputeOf<P>, kNativeLanesOf<ComputeOf<P>>>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t l = 0; l < kGemmColumns<P>; l += kLanesIn<V>) {
      ComputeOf<P>* const sum = to + i * to_row + l;
      store(sum, load<V>(sum) + load<V>(from + i * kGemmColumns<P> + l));
    }
  }
}

// tile = A B for a panel of `rows` rows of A and a block of `columns` columns: `depth` numbers, of
// whole steps, from b_depth in each of the panels of B. Packed or not: see gemm_block.
template <class P, bool Packed = true>
void gemm_panel(int64_t rows, int64_t depth, const P* a, int64_t a_row, const P* b, int64_t b_depth,
                int64_t columns, ComputeOf<P>* tile) {
  constexpr int64_t kColumns = kGemmColumns<P>;
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(P));
  const int64_t row = gemm_tile_row<P>(columns);
  const int64_t panels = row / kColumns;
  if (depth == 0) {
    std::memset(static_cast<void*>(tile), 0, static_cast<size_t>(rows * row) * sizeof(*tile));
  }
  GemmAhead asked;
  for (int64_t k = 0; k < depth; k += kGemmPartDepth) {
    const int64_t part = smaller(kGemmPartDepth, depth - k);
    // Where the next part follows in memory, it arrives while this one is at work.
    const P* ahead = a + (k + part) * rows;
    const P* const end = Packed ? a + smaller(depth, k + 2 * part) * rows : ahead;
    const int64_t lines = ceil_div(ceil_div(part * rows, kLine), panels);
    for (int64_t j = 0; j < panels; ++j) {
      asked.clear();
      for (int64_t i = 0; i < lines && ahead < end; ++i, ahead += kLine) {
        asked.add(ahead);
      }
      const P* const own_a = a + k * (Packed ? rows : 1);
      const P* const own_b = b + (j * b_depth + k) * kColumns;
      if (k == 0) {
        gemm_rows<P, Packed>(rows, part, own_a, a_row, own_b, tile + j * kColumns, row, false,
                             &asked);
      } else {
        ComputeOf<P> sums[kGemmRows * kColumns];
        gemm_rows<P, Packed>(rows, part, own_a, a_row, own_b, sums, kColumns, false, &asked);
        gemm_add_tile<P>(rows, sums, tile + j * kColumns, row);
      }
    }
  }
}

// Steps from numbers that lie side by side: `count` of them, 0 behind.
template <class P, class S>
Vec<GemmLane<P>, kNativeLanesOf<ComputeOf<P>>> gemm_steps(const S* from, int64_t count) {
  constexpr int kLanes = kNativeLanesOf<ComputeOf<P>>;
  using Steps = Vec<GemmLane<P>, kLanes>;
  constexpr int64_t kNumbers = kLanes * kGemmStep<P>;
  if constexpr (kGemmStep<P> == 2) {
    if (count >= kNumbers) {
      return load<Steps>(from);
    }
    P part[kNumbers] = {};
    std::memcpy(part, from, static_cast<size_t>(larger(0, count)) * sizeof(P));
    return load<Steps>(part);
  } else if (count >= kNumbers) {
    return load_as<Steps>(from);
  } else {
    return count > 0 ? load_part<Steps>(from, count) : Steps{};
  }
}

// A row of numbers, as they are packed, becomes step k of panels gemm_depth deep; of pairs, two
// rows.
template <class P>
void gemm_spread_row(const P* row, const P* next, int64_t columns, int64_t depth, int64_t k,
                     P* to) {
  constexpr int64_t kColumns = kGemmColumns<P>;
  for (int64_t j = 0; j < columns; j += kColumns) {
    P* const step = to + j * depth + k * kColumns;
    if constexpr (kGemmStep<P> == 2) {
      gemm_pair_rows(row + j, next + j, step);
    } else {
      std::memcpy(step, row + j, kColumns * sizeof(P));
    }
  }
}

// The panels of gemm_pack_columns from rows of numbers that lie side by side, `row` apart.
template <class P, class S>
void gemm_pack_from_rows(const S* b, int64_t row, int64_t columns, int64_t depth, P* to) {
  constexpr int64_t kColumns = kGemmColumns<P>;
  constexpr int64_t kLanes = kColumns / 2;
  constexpr int kStep = kGemmStep<P>;
  using V = Vec<ComputeOf<P>, kLanes>;
  const int64_t deep = gemm_depth<P>(depth);
  const int64_t whole = columns / kColumns * kColumns;
  for (int64_t k = 0; k < depth; k += kStep) {
    const S* const from = b + k * row;
    P* step = to + k * kColumns;
    if constexpr (kStep == 2) {
      P rows[2][kColumns] = {};
      const bool both = k + 1 < depth;
      for (int64_t j = 0; j < columns; j += kColumns, step += deep * kColumns) {
        if (j < whole && both) {
          gemm_pair_rows(from + j, from + row + j, step);
          continue;
        }
        const auto bytes = static_cast<size_t>(smaller(kColumns, columns - j)) * sizeof(P);
        std::memset(static_cast<void*>(rows), 0, sizeof(rows));
        std::memcpy(rows[0], from + j, bytes);
        if (both) {
          std::memcpy(rows[1], from + row + j, bytes);
        }
        gemm_pair_rows(rows[0], rows[1], step);
      }
    } else {
      int64_t j = 0;
      for (; j < whole; j += kColumns, step += deep * kColumns) {
        store(step, load_as<V>(from + j));
        store(step + kLanes, load_as<V>(from + j + kLanes));
      }
      if (j < columns) {
        store(step, gemm_steps<P>(from + j, columns - j));
        store(step + kLanes, gemm_steps<P>(from + j + kLanes, columns - j - kLanes));
      }
    }
  }
}

// The same from columns of numbers that lie side by side, `column` apart: squares are transposed.
template <class P, class S>
void gemm_pack_from_columns(const S* b, int64_t column, int64_t columns, int64_t depth, P* to) {
  constexpr int64_t kColumns = kGemmColumns<P>;
  constexpr int kLanes = kNativeLanesOf<ComputeOf<P>>;
  constexpr int64_t kNumbers = int64_t{kLanes} * kGemmStep<P>;
  using Steps = Vec<GemmLane<P>, kLanes>;
  const int64_t deep = gemm_depth<P>(depth);
  for (int64_t j = 0; j < gemm_panels(columns, kColumns) * kColumns; j += kLanes) {
    auto* const panel =
        reinterpret_cast<GemmLane<P>*>(to + j / kColumns * kColumns * deep) + j % kColumns;
    for (int64_t k = 0; k < depth; k += kNumbers) {
      Steps square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = j + i < columns ? gemm_steps<P>(b + (j + i) * column + k, depth - k) : Steps{};
      }
      transpose_square(square);
      const int64_t part = smaller(kLanes, (deep - k) / kGemmStep<P>);
      for (int64_t i = 0; i < part; ++i) {
        store(panel + (k / kGemmStep<P> + i) * kColumns, square[i]);
      }
    }
  }
}

// Panels of columns from b[k * row + j * column], of which one stride is 1.
template <class P, class S>
void gemm_pack_block(const S* b, int64_t row, int64_t column, int64_t columns, int64_t depth,
                     P* to) {
  if (column == 1) {
    gemm_pack_from_rows(b, row, columns, depth, to);
  } else {
    gemm_pack_from_columns(b, column, columns, depth, to);
  }
}

}  // namespace pydense::PYDENSE_ISA
