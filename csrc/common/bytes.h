// SPDX-License-Identifier: Apache-2.0
// Bytes as lanes of wide integers and back, and vectors that lie across two others.
#pragma once

#include <utility>

#include "common/simd.h"

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

namespace pydense::PYDENSE_ISA {

// I: a vector of int32_t or int64_t. Compilers take a dozen instructions for what is one.
template <class I>
PYDENSE_HD I load_bytes(const uint8_t* from) {
  constexpr int kLanes = kLanesIn<I>;
  using Bytes = Vec<uint8_t, kLanes>;
#if defined(__AVX512F__)
  // The forms with a mask: gcc warns of undefined lanes in the others.
  if constexpr (sizeof(I) == 64 && kLanes == 16) {
    return bit_cast<I>(_mm512_maskz_cvtepu8_epi32(0xFFFF, load<__m128i>(from)));
  }
  if constexpr (sizeof(I) == 64 && kLanes == 8) {
    return bit_cast<I>(
        _mm512_maskz_cvtepu8_epi64(0xFF, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(I) == 32 && kLanes == 8) {
    return bit_cast<I>(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  if constexpr (sizeof(I) == 32 && kLanes == 4) {
    return bit_cast<I>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load<int32_t>(from))));
  }
#elif defined(__SSE4_1__)
  if constexpr (sizeof(I) == 16 && kLanes == 4) {
    return bit_cast<I>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(load<int32_t>(from))));
  }
#endif
  return __builtin_convertvector(load<Bytes>(from), I);
}

// The same with the sign of each byte.
template <class I>
PYDENSE_HD I load_signed_bytes(const int8_t* from) {
  constexpr int kLanes = kLanesIn<I>;
#if defined(__AVX2__)
  if constexpr (sizeof(I) == 32 && kLanes == 8) {
    return bit_cast<I>(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  if constexpr (sizeof(I) == 32 && kLanes == 4) {
    return bit_cast<I>(_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(load<int32_t>(from))));
  }
#elif defined(__SSE4_1__)
  if constexpr (sizeof(I) == 16 && kLanes == 4) {
    return bit_cast<I>(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load<int32_t>(from))));
  }
#endif
  return __builtin_convertvector(load<Vec<int8_t, kLanes>>(from), I);
}

// Lanes J, J + 1, ... of a followed by b.
template <int J, class V>
PYDENSE_HD V lanes_from(const V& a, const V& b) {
#if defined(__AVX512F__)
  // gcc 12 takes the instruction for any permutation instead, which is slower. (With a mask:
  // without one its header uses an undefined vector.)
  if constexpr (sizeof(V) == 64 && sizeof(LaneOf<V>) == 4) {
    return bit_cast<V>(
        _mm512_maskz_alignr_epi32(0xffff, bit_cast<__m512i>(b), bit_cast<__m512i>(a), J));
  }
  if constexpr (sizeof(V) == 64 && sizeof(LaneOf<V>) == 8) {
    return bit_cast<V>(
        _mm512_maskz_alignr_epi64(0xff, bit_cast<__m512i>(b), bit_cast<__m512i>(a), J));
  }
#endif
  return [&]<int... Lane>(std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(a, b, (J + Lane)...);
  }(std::make_integer_sequence<int, kLanesIn<V>>{});
}

}  // namespace pydense::PYDENSE_ISA
