// SPDX-License-Identifier: Apache-2.0
// Products whose sums lie in memory between slabs of depth: what gemm_panel does for those that it
// completes at once. A chain of multiply-adds along thousands of channels and all taps has several
// times the error of short ones whose sums are added.
#pragma once

#include "common/gemm/gemm_panels.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kGemmShortPart = 32;  // is not worth an addition of its own

// As gemm_rows, in parts of kGemmPartDepth. Slabs of whole parts make the numbers independent of
// the slabs. The error of pairs of 16-bit numbers is that of rounding them: theirs is one chain.
template <class P, bool Packed>
PYDENSE_HD void gemm_rows_in_parts(int64_t rows, int64_t depth, const P* a, int64_t a_row,
                                   const P* b, ComputeOf<P>* c, int64_t c_row, bool more) {
  if constexpr (kGemmStep<P> == 2) {
    gemm_rows<P, Packed>(rows, depth, a, a_row, b, c, c_row, more);
  } else {
    for (int64_t k = 0; k < depth; k += kGemmPartDepth) {
      const int64_t part = smaller(kGemmPartDepth, depth - k);
      const P* const own_a = a + k * (Packed ? rows : 1);
      const P* const own_b = b + k * kGemmColumns<P>;
      if ((k == 0 && !more) || part < kGemmShortPart) {
        gemm_rows<P, Packed>(rows, part, own_a, a_row, own_b, c, c_row, more || k > 0);
      } else {
        ComputeOf<P> sums[kGemmRows * kGemmColumns<P>];
        gemm_rows<P, Packed>(rows, part, own_a, a_row, own_b, sums, kGemmColumns<P>);
        gemm_add_tile<P>(rows, sums, c, c_row);
      }
    }
  }
}

}  // namespace pydense::PYDENSE_ISA
