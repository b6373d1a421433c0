// SPDX-License-Identifier: Apache-2.0
// Moving lanes within and between vectors.
#pragma once

#include <utility>

#include "common/simd.h"

namespace pydense::PYDENSE_ISA {

// v[index[l]] in lane l.
template <class V, class I>
PYDENSE_HD V permute(const V& v, const I& index) {
#if defined(__clang__)
  V result;
  for (int l = 0; l < kLanesIn<V>; ++l) {
    result[l] = v[index[l]];
  }
  return result;
#else
  return __builtin_shuffle(v, index);
#endif
}

// The same from two vectors, v[index[l]] of a, then b.
template <class V, class I>
PYDENSE_HD V permute(const V& a, const V& b, const I& index) {
#if defined(__clang__)
  V result;
  for (int l = 0; l < kLanesIn<V>; ++l) {
    result[l] = index[l] < kLanesIn<V> ? a[index[l]] : b[index[l] - kLanesIn<V>];
  }
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Whether any bit is set. By value, and without its address: a mask that has one is kept in memory
// all along.
template <class I>
PYDENSE_HD bool any_lane(I mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(I) == 64) {
    return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
  }
#endif
  if constexpr (kLanesIn<I> <= 2) {
    return (mask[0] | mask[kLanesIn<I> - 1]) != 0;
  } else {
    return [&]<int... L>(std::integer_sequence<int, L...>) {
      return any_lane(__builtin_shufflevector(mask, mask, L...) |
                      __builtin_shufflevector(mask, mask, (kLanesIn<I> / 2 + L)...));
    }(std::make_integer_sequence<int, kLanesIn<I> / 2>{});
  }
}

template <class V, int Distance, int... Lane>
PYDENSE_HD void exchange(V& a, V& b, std::integer_sequence<int, Lane...> /*lanes*/) {
  constexpr int kLanes = sizeof...(Lane);
  const V low =
      __builtin_shufflevector(a, b, ((Lane & Distance) != 0 ? kLanes + Lane - Distance : Lane)...);
  b = __builtin_shufflevector(a, b, ((Lane & Distance) != 0 ? kLanes + Lane : Lane + Distance)...);
  a = low;
}

// Transposes a square of as many vectors as each has lanes.
template <class V, int Distance = kLanesIn<V> / 2>
PYDENSE_HD void transpose_square(V* v) {
  constexpr int kLanes = kLanesIn<V>;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & Distance) == 0) {
      exchange<V, Distance>(v[i], v[i + Distance], std::make_integer_sequence<int, kLanes>());
    }
  }
  if constexpr (Distance > 1) {
    transpose_square<V, Distance / 2>(v);
  }
}

}  // namespace pydense::PYDENSE_ISA
