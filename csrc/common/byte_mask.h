// SPDX-License-Identifier: Apache-2.0
// Which bytes of a native vector hold: as a mask that wider lanes are added under, a part of it at
// a time. One comparison serves four vectors of float.
#pragma once

#include "common/bytes.h"

namespace pydense::PYDENSE_ISA {

constexpr int kNativeBytes = kNativeLanes * 4;
using ByteVec = Vec<uint8_t, kNativeBytes>;

// The first `count` bytes from memory, 0 in the others; Usual is a count known when compiling.
template <int Usual>
PYDENSE_HD ByteVec load_first_bytes(const uint8_t* from, int64_t count) {
#if defined(__AVX512BW__)
  return bit_cast<ByteVec>(_mm512_maskz_loadu_epi8(~uint64_t{0} >> (kNativeBytes - count), from));
#else
  ByteVec bytes{};
  std::memcpy(&bytes, from, static_cast<size_t>(count == Usual ? Usual : count));
  return bytes;
#endif
}

#if defined(__AVX512BW__)

class ByteMask {
 public:
  static PYDENSE_HD ByteMask less(const ByteVec& a, uint8_t b) {
    return ByteMask(_mm512_cmplt_epu8_mask(bit_cast<__m512i>(a), _mm512_set1_epi8(char(b))));
  }
  static PYDENSE_HD ByteMask equal(const ByteVec& a, uint8_t b) {
    return ByteMask(_mm512_cmpeq_epi8_mask(bit_cast<__m512i>(a), _mm512_set1_epi8(char(b))));
  }
  PYDENSE_HD ByteVec choose(const ByteVec& yes, const ByteVec& no) const {
    return bit_cast<ByteVec>(
        _mm512_mask_mov_epi8(bit_cast<__m512i>(no), bits_, bit_cast<__m512i>(yes)));
  }
  // sum + term in the lanes whose bytes hold, sum in the others; V's bytes begin at First.
  template <int First, class V>
  PYDENSE_HD V add(const V& sum, const V& term) const {
    // As an instruction: gcc 12 takes masks that it narrows through other registers and back, twice
    // the work of the additions.
    const __mmask64 own = First == 0 ? bits_ : _kshiftri_mask64(bits_, First);
    V result = sum;
    if constexpr (sizeof(LaneOf<V>) == 4) {
      asm("vaddps %1, %0, %0 %{%2%}" : "+v"(result) : "vm"(term), "Yk"(own));
    } else {
      asm("vaddpd %1, %0, %0 %{%2%}" : "+v"(result) : "vm"(term), "Yk"(own));
    }
    return result;
  }

 private:
  explicit PYDENSE_HD ByteMask(__mmask64 bits) : bits_(bits) {}
  __mmask64 bits_;
};

#else

class ByteMask {
 public:
  static PYDENSE_HD ByteMask less(const ByteVec& a, uint8_t b) { return ByteMask(a < b); }
  static PYDENSE_HD ByteMask equal(const ByteVec& a, uint8_t b) { return ByteMask(a == b); }
  PYDENSE_HD ByteVec choose(const ByteVec& yes, const ByteVec& no) const {
    return bit_cast<Lanes>(lanes_) != 0 ? yes : no;
  }
  template <int First, class V>
  PYDENSE_HD V add(const V& sum, const V& term) const {
    using I = Vec<IntOf<LaneOf<V>>, kLanesIn<V>>;
    const I held = load_signed_bytes<I>(reinterpret_cast<const int8_t*>(&lanes_) + First);
    // A sum that begins with 0 is never -0: adding 0 leaves it.
    return sum + bit_cast<V>(bit_cast<I>(term) & held);
  }

 private:
  using Lanes = Vec<int8_t, kNativeBytes>;
  explicit PYDENSE_HD ByteMask(const Lanes& lanes) : lanes_(lanes) {}
  Lanes lanes_;
};

#endif

}  // namespace pydense::PYDENSE_ISA
