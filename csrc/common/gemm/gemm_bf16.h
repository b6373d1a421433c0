// SPDX-License-Identifier: Apache-2.0
// What the operands of a packed product are made of. float and double stay what they are; 16-bit
// numbers are widened to float, but for bfloat16 where the CPU multiplies pairs of it (AVX-512
// BF16): there a *step* along the depth is a pair, and operands take half the memory.
//
// An instruction adds both products of a pair to a float. It rounds in its own order, so numbers
// differ by rounding from those of widened operands, and it takes subnormal numbers for 0, in
// operands and in sums, whatever the floating-point mode. NaN and infinity are as ever.
#pragma once

#include "common/half.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace pydense::PYDENSE_ISA {

#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

// What numbers that are S in memory are packed as.
template <class S>
using GemmOperandOf =
    std::conditional_t<kMultipliesPairs && std::is_same_v<S, BFloat16>, BFloat16, ComputeOf<S>>;

// Numbers in a step along the depth: they lie side by side in panels.
template <class P>
constexpr int kGemmStep = std::is_same_v<P, BFloat16> ? 2 : 1;

// The depth of packed panels: whole steps, the last one filled up with 0.
template <class P>
constexpr int64_t gemm_depth(int64_t depth) {
  return (depth + kGemmStep<P> - 1) / kGemmStep<P> * kGemmStep<P>;
}

// A step as one lane.
template <class P>
using GemmLane = std::conditional_t<std::is_same_v<P, BFloat16>, uint32_t, P>;

// sum + the products of a step, in every lane.
template <class P, class A, class V>
PYDENSE_HD V gemm_add(const A& a, const A& b, const V& sum) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<P, BFloat16>) {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  } else
#endif
  {
    static_assert(!std::is_same_v<P, BFloat16>, "bfloat16 is widened here");
    return fma(a, b, sum);
  }
}

// A step of a panel of columns from two rows of 2 kNativeLanes numbers: those of an even place in
// the depth, and those that follow them.
PYDENSE_HD void gemm_pair_rows(const BFloat16* even, const BFloat16* odd, BFloat16* to) {
  constexpr int kCount = 2 * kNativeLanes;
  using Row = Vec<uint16_t, kCount>;
  const auto a = load<Row>(even);
  const auto b = load<Row>(odd);
  [&]<int... Lane>(std::integer_sequence<int, Lane...>) {
    constexpr int kHalf = kCount / 2;
    store(to, __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * kCount)...));
    store(to + kCount, __builtin_shufflevector(a, b, (kHalf + Lane / 2 + Lane % 2 * kCount)...));
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace pydense::PYDENSE_ISA
