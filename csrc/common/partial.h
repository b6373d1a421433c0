// SPDX-License-Identifier: Apache-2.0
// The ends of rows: minima of sizes, and vectors of which only the first lanes are in memory.
#pragma once

#include <cstring>

#include "common/half.h"

namespace pydense::PYDENSE_ISA {

PYDENSE_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYDENSE_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The first `count` lanes from memory, 0 in the others.
template <class V, class S>
PYDENSE_HD V load_part(const S* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float> && sizeof(V) == 64) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(0xFFFFU >> (16 - count)), from);
  }
#endif
  S lanes[kLanesIn<V>] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(S));
  return load_as<V>(lanes);
}
template <class V, class S>
PYDENSE_HD void store_part(S* to, const V& v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float> && sizeof(V) == 64) {
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(0xFFFFU >> (16 - count)), v);
  }
#endif
  S lanes[kLanesIn<V>];
  store_as(lanes, v);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(S));
}

}  // namespace pydense::PYDENSE_ISA
