// SPDX-License-Identifier: Apache-2.0
// 16-bit floating-point numbers as they lie in memory, and their way to float and back. Kernels
// compute in float: load_as and store_as convert whole vectors, rounding to nearest even.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/float_type.h"
#include "common/simd.h"

namespace pydense::PYDENSE_ISA {

// B: uint32_t or a vector of it, holding 16 bits each; F: float or a vector of it.
template <class F, class B>
PYDENSE_HD F float_of(const B& bits, BFloat16 /*format*/) {
  return bit_cast<F>(bits << 16);
}
template <class B, class F>
PYDENSE_HD B bits_of(const F& value, BFloat16 /*format*/) {
  const B raw = bit_cast<B>(value);
  const B even = raw + 0x7FFFU + ((raw >> 16) & 1U);
  return (value == value ? even : raw | 0x400000U) >> 16;  // a NaN stays one
}

template <class F, class B>
PYDENSE_HD F float_of(const B& bits, Half /*format*/) {
  const B magnitude = (bits & 0x7FFFU) << 13;
  // The exponent moves by the difference of the biases; subnormal numbers come out exact as well.
  const F finite = bit_cast<F>(magnitude) * 0x1p112F;
  const B special = magnitude | 0x7F800000U;
  const B value = magnitude < 0x0F800000U ? bit_cast<B>(finite) : special;
  return bit_cast<F>(value | ((bits & 0x8000U) << 16));
}
template <class B, class F>
PYDENSE_HD B bits_of(const F& value, Half /*format*/) {
  const B raw = bit_cast<B>(value);
  const B magnitude = raw & 0x7FFFFFFFU;
  const B normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  // 0.5 has the spacing of subnormal halves: the addition rounds, the low bits are the result.
  const B subnormal = bit_cast<B>(bit_cast<F>(magnitude) + 0.5F) - 0x3F000000U;
  const B finite = magnitude < 0x38800000U ? subnormal : normal;
  const B infinite = magnitude > 0x7F800000U ? B{} + 0x7E00U : B{} + 0x7C00U;
  const B result = magnitude < 0x477FF000U ? finite : infinite;  // 65520 rounds to infinity
  return result | ((raw >> 16) & 0x8000U);
}

// V's lanes from memory, converted.
template <class V, class S>
PYDENSE_HD V load_as(const S* from) {
  constexpr int kLanes = kLanesIn<V>;
  if constexpr (std::is_same_v<S, LaneOf<V>>) {
    return load<V>(from);
  } else if constexpr (kLanes == 1) {
    return float_of<float>(uint32_t{from->bits}, S{});
  } else {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, Half> && kLanes == 16) {
      // The forms with a mask: gcc warns of undefined lanes in the others.
      return _mm512_maskz_cvtph_ps(0xFFFF, load<__m256i>(from));
    }
#endif
#if defined(__F16C__)
    if constexpr (std::is_same_v<S, Half> && kLanes == 8) {
      return _mm256_cvtph_ps(load<__m128i>(from));
    }
#endif
    const auto narrow = load<Vec<uint16_t, kLanes>>(from);
    return float_of<V>(__builtin_convertvector(narrow, Vec<uint32_t, kLanes>), S{});
  }
}

template <class V, class S>
PYDENSE_HD void store_as(S* to, const V& v) {
  constexpr int kLanes = kLanesIn<V>;
  if constexpr (std::is_same_v<S, LaneOf<V>>) {
    store(to, v);
  } else if constexpr (kLanes == 1) {
    to->bits = static_cast<uint16_t>(bits_of<uint32_t>(v, S{}));
  } else {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, Half> && kLanes == 16) {
      return store(to, _mm512_maskz_cvtps_ph(0xFFFF, v, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<S, BFloat16> && kLanes == 16) {
      // The instruction would make subnormal numbers 0: they go the long way.
      constexpr int kSubnormal = 0x20;
      if (_mm512_fpclass_ps_mask(v, kSubnormal) == 0) [[likely]] {
        return store(to, _mm512_cvtneps_pbh(v));
      }
    }
#endif
#if defined(__F16C__)
    if constexpr (std::is_same_v<S, Half> && kLanes == 8) {
      return store(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    using Bits = Vec<uint32_t, kLanes>;
    store(to, __builtin_convertvector(bits_of<Bits>(v, S{}), Vec<uint16_t, kLanes>));
  }
}

}  // namespace pydense::PYDENSE_ISA
