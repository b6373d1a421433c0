// SPDX-License-Identifier: Apache-2.0
// Which number of a window is its maximum, and how its place is written: for CPU and CUDA.
#pragma once

#include "common/hd.h"
#include "common/isa_namespace.h"

namespace pydense::PYDENSE_ISA {

// The place of a window's maximum is row << kPoolRowBits | column.
constexpr int kPoolRowBits = 4;
constexpr int kPoolColumns = 1 << kPoolRowBits;

// A later number takes the place of the best one so far where it is larger or NaN: so the first of
// equal numbers stays, and the last NaN. V and I are numbers, or vectors of them.
template <bool Offsets, class V, class I>
PYDENSE_HD void take_later(const V& v, const I& code, V& best, I& best_code) {
  const I wins = (v > best) | (v != v);
  best = wins ? v : best;
  if constexpr (Offsets) {
    best_code = wins ? code : best_code;
  }
}

}  // namespace pydense::PYDENSE_ISA
