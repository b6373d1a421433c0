// SPDX-License-Identifier: Apache-2.0
// One SIMD type for all kernels, over the compilers' vector extension: the same source becomes
// AVX-512, AVX2, SSE4 or NEON code by the flags of its unit. No fused multiply-add is formed
// (-ffp-contract=off), and sums across lanes have one fixed order, so results are bitwise equal
// on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/hd.h"
#include "common/isa_namespace.h"

namespace pydense::PYDENSE_ISA {

template <int Lanes>
struct VecTypes {
  typedef float Float __attribute__((vector_size(sizeof(float) * Lanes)));
  typedef int32_t Int __attribute__((vector_size(sizeof(int32_t) * Lanes)));
  typedef uint32_t Bits __attribute__((vector_size(sizeof(uint32_t) * Lanes)));
};
template <>
struct VecTypes<1> {
  using Float = float;
  using Int = int32_t;
  using Bits = uint32_t;
};
template <int Lanes>
using FloatVec = typename VecTypes<Lanes>::Float;
template <int Lanes>
using IntVec = typename VecTypes<Lanes>::Int;
template <int Lanes>
using BitVec = typename VecTypes<Lanes>::Bits;

#if defined(__AVX512F__)
constexpr int kNativeLanes = 16;
#elif defined(__AVX__)
constexpr int kNativeLanes = 8;
#else
constexpr int kNativeLanes = 4;
#endif

template <class V>
PYDENSE_HD V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
PYDENSE_HD void store(void* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}
template <class To, class From>
PYDENSE_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
PYDENSE_HD V max(const V& a, const V& b) {
  return a > b ? a : b;
}

// Sum and maximum over the lanes, by halves.
template <int Lanes>
PYDENSE_HD float lane_sum(const FloatVec<Lanes>& v) {
  if constexpr (Lanes == 1) {
    return v;
  } else {
    const auto* p = reinterpret_cast<const char*>(&v);
    using Half = FloatVec<Lanes / 2>;
    return lane_sum<Lanes / 2>(load<Half>(p) + load<Half>(p + sizeof(Half)));
  }
}
template <int Lanes>
PYDENSE_HD float lane_max(const FloatVec<Lanes>& v) {
  if constexpr (Lanes == 1) {
    return v;
  } else {
    const auto* p = reinterpret_cast<const char*>(&v);
    using Half = FloatVec<Lanes / 2>;
    return lane_max<Lanes / 2>(max(load<Half>(p), load<Half>(p + sizeof(Half))));
  }
}

// e^x for x <= 0, within 2 ulp; results below the smallest normal number are 0, NaN stays NaN.
// Range reduction x = n ln2 + r, |r| <= ln2 / 2, and a degree-7 minimax polynomial (Cephes).
template <class F>
PYDENSE_HD F exp_nonpositive(F x) {
  using B = BitVec<static_cast<int>(sizeof(F) / sizeof(float))>;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  constexpr float kSmallest = -87.336544f;
  const auto vanishes = x < kSmallest;
  x = vanishes ? F{} + kSmallest : x;
  const F shifted = x * 1.44269504088896341f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // Estrin's order: the chain of dependent operations is half as long as Horner's.
  const F r2 = r * r;
  const F low = r * 1.6666665459e-1f + 5.0000001201e-1f;
  const F middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
  const F high = r * 1.9875691500e-4f + 1.3981999507e-3f;
  F p = (low + middle * r2) + high * (r2 * r2);
  p = (p * r2 + r) + 1.f;
  // The low bits of `shifted` hold n: move them into the exponent.
  const F y = bit_cast<F>(bit_cast<B>(p) + (bit_cast<B>(shifted) << 23));
  const F finite = vanishes ? F{} : y;
  return x == x ? finite : x;
}

}  // namespace pydense::PYDENSE_ISA
