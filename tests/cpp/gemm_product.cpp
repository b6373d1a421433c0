// SPDX-License-Identifier: Apache-2.0
#include "gemm_product.h"

#include <vector>

#include "common/gemm/gemm.h"

namespace pydense::PYDENSE_ISA {
namespace {

// Panels of columns by the way of kernels that gather: row by row.
template <class S, class P>
void gather_columns(const GemmProduct& args, const S* b, P* to) {
  constexpr auto kColumns = kGemmColumns<P>;
  for (int64_t first = 0; first < args.columns; first += kColumns) {
    const int64_t count = smaller(kColumns, args.columns - first);
    for (int64_t k = 0; k < args.depth; k += kGemmStep<P>, to += kColumns * kGemmStep<P>) {
      P rows[2][kColumns] = {};
      for (int64_t own = k; own < k + kGemmStep<P> && own < args.depth; ++own) {
        for (int64_t j = 0; j < count; ++j) {
          rows[own - k][j] = gemm_operand<P>(b + own * args.columns + first + j);
        }
      }
      if constexpr (kGemmStep<P> == 2) {
        gemm_pair_rows(rows[0], rows[1], to);
      } else {
        std::memcpy(to, rows[0], sizeof(rows[0]));
      }
    }
  }
}

template <class S>
void product(const GemmProduct& args) {
  using P = GemmOperandOf<S>;
  using T = ComputeOf<P>;
  constexpr int64_t kColumns = kGemmColumns<P>;
  const int64_t depth = gemm_depth<P>(args.depth);
  const int64_t columns = gemm_panels(args.columns, kColumns) * kColumns;
  const auto* const a = static_cast<const S*>(args.a);
  const auto* const b = static_cast<const S*>(args.b);
  auto* const c = static_cast<T*>(args.c);
  // Vectors end with the last number, so that AddressSanitizer sees what reads on.
  std::vector<P> left(static_cast<size_t>(args.rows * depth));
  std::vector<P> right(static_cast<size_t>(columns * depth));
  if (args.packed) {
    gemm_pack_rows(a, args.depth, 1, args.rows, args.depth, left.data());
    gemm_pack_columns(b, args.columns, 1, args.columns, args.depth, right.data());
  } else {
    for (int64_t i = 0; i < args.rows; ++i) {
      for (int64_t k = 0; k < args.depth; ++k) {
        left[static_cast<size_t>(i * depth + k)] = gemm_operand<P>(a + i * args.depth + k);
      }
    }
    gather_columns(args, b, right.data());
  }
  T block[kGemmRows * kColumns];
  GemmAhead ahead;
  ahead.add(c, 64);
  for (int64_t i = 0; i < args.rows; i += kGemmRows) {
    const int64_t rows = smaller(kGemmRows, args.rows - i);
    for (int64_t j = 0; j < args.columns; j += kColumns) {
      const int64_t count = smaller(kColumns, args.columns - j);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < count; ++n) {
          block[r * kColumns + n] = c[(i + r) * args.columns + j + n];
        }
      }
      const P* const row = left.data() + i * depth;
      const P* const panel = right.data() + j * depth;
      if (args.packed) {
        gemm_rows<P, true>(rows, depth, row, 0, panel, block, kColumns, args.more, &ahead);
      } else {
        gemm_rows<P, false>(rows, depth, row, depth, panel, block, kColumns, args.more);
      }
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(c + (i + r) * args.columns + j, block + r * kColumns,
                    static_cast<size_t>(count) * sizeof(T));
      }
    }
  }
}

}  // namespace

extern const GemmProductTable kGemmProductTable;
const GemmProductTable kGemmProductTable = {
    {product<float>, product<double>, product<BFloat16>, product<Half>}, kMultipliesPairs};

}  // namespace pydense::PYDENSE_ISA
