// SPDX-License-Identifier: Apache-2.0
// Bytes that say which lanes of wider vectors are added: a native vector of them serves four
// vectors of float.
#pragma once

#include "common/bytes.h"

namespace pydense::PYDENSE_ISA {

constexpr int kNativeBytes = kNativeLanes * 4;
using ByteVec = Vec<uint8_t, kNativeBytes>;

// The first `count` bytes from memory, `other` in the others; Usual is a count known when
// compiling.
template <int Usual>
PYDENSE_HD ByteVec load_first_bytes(const uint8_t* from, int64_t count, uint8_t other) {
#if defined(__AVX512BW__)
  return bit_cast<ByteVec>(_mm512_mask_loadu_epi8(_mm512_set1_epi8(char(other)),
                                                  ~uint64_t{0} >> (kNativeBytes - count), from));
#else
  ByteVec bytes = ByteVec{} + other;
  std::memcpy(&bytes, from, static_cast<size_t>(count == Usual ? Usual : count));
  return bytes;
#endif
}

// The bytes of Parts vectors V, one for a lane: a native vector begins with them.
#if defined(__AVX512BW__)

// The vectors' bytes are compared apart too: a mask of all would have to be shifted, which takes
// the ports that add, while few bytes are compared beside.
template <class V, int Parts>
class PartBytes {
  static constexpr int kLanes = kLanesIn<V>;
  using Part = Vec<uint8_t, 16>;

 public:
  class Mask {
   public:
    PYDENSE_HD Mask(const PartBytes& bytes, uint8_t value)
        : whole_(_mm512_cmpeq_epi8_mask(bit_cast<__m512i>(bytes.whole_),
                                        _mm512_set1_epi8(char(value)))) {
      for (int p = 0; p < Parts; ++p) {
        part_[p] =
            _mm_cmpeq_epi8_mask(bit_cast<__m128i>(bytes.part_[p]), _mm_set1_epi8(char(value)));
      }
    }
    PYDENSE_HD ByteVec choose(const ByteVec& yes, const ByteVec& no) const {
      return bit_cast<ByteVec>(
          _mm512_mask_mov_epi8(bit_cast<__m512i>(no), whole_, bit_cast<__m512i>(yes)));
    }
    // For vector Part: sum + term in the lanes whose bytes hold, sum in the others.
    template <int Part>
    PYDENSE_HD V add(const V& sum, const V& term) const {
      // As an instruction: gcc 12 takes masks that it narrows through other registers and back.
      V result = sum;
      if constexpr (sizeof(LaneOf<V>) == 4) {
        asm("vaddps %1, %0, %0 %{%2%}" : "+v"(result) : "vm"(term), "Yk"(part_[Part]));
      } else {
        asm("vaddpd %1, %0, %0 %{%2%}" : "+v"(result) : "vm"(term), "Yk"(part_[Part]));
      }
      return result;
    }

   private:
    __mmask64 whole_;
    __mmask16 part_[Parts];
  };

  explicit PYDENSE_HD PartBytes(const uint8_t* from) : whole_(load<ByteVec>(from)) {
    for (int p = 0; p < Parts; ++p) {
      part_[p] = Part{};
      std::memcpy(&part_[p], from + int64_t{p} * kLanes, kLanes);
    }
  }
  explicit PYDENSE_HD PartBytes(const ByteVec& whole) : whole_(whole) {
    static_assert(Parts == 1);
    part_[0] = Part{};
    std::memcpy(&part_[0], &whole, kLanes);
  }
  PYDENSE_HD const ByteVec& whole() const { return whole_; }
  PYDENSE_HD Mask equal(uint8_t value) const { return Mask(*this, value); }
  PYDENSE_HD PartBytes operator&(uint8_t bits) const {
    PartBytes result = *this;
    result.whole_ &= bits;
    for (int p = 0; p < Parts; ++p) {
      result.part_[p] &= bits;
    }
    return result;
  }

 private:
  ByteVec whole_;
  Part part_[Parts];
};

#else

template <class V, int Parts>
class PartBytes {
 public:
  class Mask {
    using Lanes = Vec<int8_t, kNativeBytes>;

   public:
    explicit PYDENSE_HD Mask(const Lanes& lanes) : lanes_(lanes) {}
    PYDENSE_HD ByteVec choose(const ByteVec& yes, const ByteVec& no) const {
      return lanes_ != 0 ? yes : no;
    }
    template <int Part>
    PYDENSE_HD V add(const V& sum, const V& term) const {
      using I = Vec<IntOf<LaneOf<V>>, kLanesIn<V>>;
      const auto* const own = reinterpret_cast<const int8_t*>(&lanes_) + Part * kLanesIn<V>;
      // A sum that begins with 0 is never -0: adding 0 leaves it.
      return sum + bit_cast<V>(bit_cast<I>(term) & load_signed_bytes<I>(own));
    }

   private:
    Lanes lanes_;
  };

  explicit PYDENSE_HD PartBytes(const uint8_t* from) : whole_(load<ByteVec>(from)) {}
  explicit PYDENSE_HD PartBytes(const ByteVec& whole) : whole_(whole) {}
  PYDENSE_HD const ByteVec& whole() const { return whole_; }
  PYDENSE_HD Mask equal(uint8_t value) const { return Mask(whole_ == value); }
  PYDENSE_HD PartBytes operator&(uint8_t bits) const { return PartBytes(whole_ & bits); }

 private:
  ByteVec whole_;
};

#endif

}  // namespace pydense::PYDENSE_ISA
