// SPDX-License-Identifier: Apache-2.0
// One SIMD type for all kernels, over the compilers' vector extension: the same source becomes
// AVX-512, AVX2, SSE4 or NEON code by the flags of its unit. No fused multiply-add is formed
// unless a kernel asks for fma (-ffp-contract=off), and sums across lanes have one fixed order:
// results are bitwise equal on every instruction set, those with fma on every one that has it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/hd.h"
#include "common/isa_namespace.h"

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pydense::PYDENSE_ISA {

template <class T, int Lanes>
struct VecTypes {
  typedef T Type __attribute__((vector_size(sizeof(T) * Lanes)));
};
template <class T>
struct VecTypes<T, 1> {
  using Type = T;
};
template <class T, int Lanes>
using Vec = typename VecTypes<T, Lanes>::Type;

// The integers as wide as a float or double: comparisons give IntOf, bit_cast goes to BitsOf.
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <int Lanes>
using FloatVec = Vec<float, Lanes>;
template <int Lanes>
using DoubleVec = Vec<double, Lanes>;
template <int Lanes>
using IntVec = Vec<int32_t, Lanes>;

// The type of a vector's lanes, and how many there are; a scalar is a vector of one.
template <class V>
struct LaneTypes {
  using Type = std::remove_cvref_t<decltype(std::declval<V>()[0])>;
};
template <>
struct LaneTypes<float> {
  using Type = float;
};
template <>
struct LaneTypes<double> {
  using Type = double;
};
template <class V>
using LaneOf = typename LaneTypes<V>::Type;
template <class V>
constexpr int kLanesIn = static_cast<int>(sizeof(V) / sizeof(LaneOf<V>));

#if defined(__AVX512F__)
constexpr int kNativeLanes = 16;
#elif defined(__AVX__)
constexpr int kNativeLanes = 8;
#else
constexpr int kNativeLanes = 4;
#endif
// Lanes of a native vector of float, double.
template <class T>
constexpr int kNativeLanesOf = kNativeLanes * 4 / static_cast<int>(sizeof(T));

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
// All lanes x. (x - 0 is x also for -0 and costs nothing; 0 + x is neither.)
template <class V>
PYDENSE_HD V broadcast(LaneOf<V> x) {
  return x - V{};
}

// The lanes of a vector from `First` on, as many as a shorter one has.
template <class To, int First = 0, class V>
PYDENSE_HD To some_lanes(const V& v) {
  return [&]<int... Lane>(std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(v, v, (First + Lane)...);
  }(std::make_integer_sequence<int, kLanesIn<To>>{});
}

template <class V>
PYDENSE_HD V max(const V& a, const V& b) {
  return a > b ? a : b;
}

// Sum and maximum over the lanes, by halves.
template <int Lanes, class V>
PYDENSE_HD LaneOf<V> lane_sum(const V& v) {
  static_assert(Lanes == kLanesIn<V>);
  if constexpr (Lanes == 1) {
    return v;
  } else {
    const auto* p = reinterpret_cast<const char*>(&v);
    using Half = Vec<LaneOf<V>, Lanes / 2>;
    return lane_sum<Lanes / 2>(load<Half>(p) + load<Half>(p + sizeof(Half)));
  }
}
template <int Lanes, class V>
PYDENSE_HD LaneOf<V> lane_max(const V& v) {
  static_assert(Lanes == kLanesIn<V>);
  if constexpr (Lanes == 1) {
    return v;
  } else {
    const auto* p = reinterpret_cast<const char*>(&v);
    using Half = Vec<LaneOf<V>, Lanes / 2>;
    return lane_max<Lanes / 2>(max(load<Half>(p), load<Half>(p + sizeof(Half))));
  }
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// a * b + c, rounded once where the unit's instruction set can (avx2 and above, aarch64). On
// baseline x86 it is rounded twice: a kernel that uses it gives up equal bits there.
template <class V>
PYDENSE_HD V fma(const V& a, const V& b, const V& c) {
  using T = LaneOf<V>;
  constexpr int kLanes = kLanesIn<V>;
  if constexpr (!kHasFma) {
    return a * b + c;
  } else if constexpr (kLanes == 1) {
    if constexpr (sizeof(T) == 4) {
      return __builtin_fmaf(a, b, c);
    } else {
      return __builtin_fma(a, b, c);
    }
  } else if constexpr (kLanes > kNativeLanesOf<T> || sizeof(V) < 16) {
    using Half = Vec<T, kLanes / 2>;
    const auto half = [](const V& v, int i) {
      return load<Half>(reinterpret_cast<const char*>(&v) + i * sizeof(Half));
    };
    V result;
    for (int i = 0; i < 2; ++i) {
      store(reinterpret_cast<char*>(&result) + i * sizeof(Half),
            fma(half(a, i), half(b, i), half(c, i)));
    }
    return result;
  } else {
#if defined(__FMA__)
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
      if constexpr (sizeof(T) == 4) {
        return _mm512_fmadd_ps(a, b, c);
      } else {
        return _mm512_fmadd_pd(a, b, c);
      }
    }
#endif
    if constexpr (sizeof(V) == 32) {
      if constexpr (sizeof(T) == 4) {
        return _mm256_fmadd_ps(a, b, c);
      } else {
        return _mm256_fmadd_pd(a, b, c);
      }
    } else if constexpr (sizeof(V) == 16) {
      if constexpr (sizeof(T) == 4) {
        return _mm_fmadd_ps(a, b, c);
      } else {
        return _mm_fmadd_pd(a, b, c);
      }
    }
#elif defined(__aarch64__)
    if constexpr (sizeof(T) == 4) {
      return vfmaq_f32(c, a, b);
    } else {
      return vfmaq_f64(c, a, b);
    }
#endif
  }
}
template <bool Fused, class V>
PYDENSE_HD V multiply_add(const V& a, const V& b, const V& c) {
  if constexpr (Fused) {
    return fma(a, b, c);
  } else {
    return a * b + c;
  }
}

// What exp_nonpositive needs of a type: the number that rounds to whole numbers by being added
// (1.5 * 2^23, 2^52), ln of the smallest normal number, ln2 in two parts of which multiples of the
// first are exact, and p(r) with e^r = 1 + r + r^2 p(r).
template <class T>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  static constexpr float kRound = 12582912.f;
  static constexpr float kSmallest = -87.336544f;
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissaBits = 23;
  // Estrin's order: the chain of dependent operations is half as long as Horner's.
  template <bool Fused, class V>
  static PYDENSE_HD V tail(const V& r, const V& r2) {
    const auto line = [&](float slope, float at0) {
      return multiply_add<Fused>(r, broadcast<V>(slope), broadcast<V>(at0));
    };
    const V low = line(1.6666665459e-1f, 5.0000001201e-1f);
    const V middle = line(8.3334519073e-3f, 4.1665795894e-2f);
    const V high = line(1.9875691500e-4f, 1.3981999507e-3f);
    return multiply_add<Fused>(high, r2 * r2, multiply_add<Fused>(middle, r2, low));
  }
};
template <>
struct ExpTraits<double> {
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kSmallest = -708.3964185322;
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLn2High = 0.693145751953125;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kMantissaBits = 52;
  template <bool Fused, class V>
  static PYDENSE_HD V tail(const V& r, const V& r2) {
    const auto line = [&](double slope, double at0) {
      return multiply_add<Fused>(r, broadcast<V>(slope), broadcast<V>(at0));
    };
    const V c0 = line(0.1666666666666641, 0.5000000000000011);
    const V c2 = line(0.008333333333494976, 0.041666666666529725);
    const V c4 = line(0.00019841269505773776, 0.0013888888943759965);
    const V c6 = line(2.7557586803895326e-06, 2.480149294963387e-05);
    const V c8 = line(2.5000018833187374e-08, 2.76303062502936e-07);
    const V r4 = r2 * r2;
    const V low = multiply_add<Fused>(c2, r2, c0);
    const V middle = multiply_add<Fused>(c6, r2, c4);
    return multiply_add<Fused>(c8, r4 * r4, multiply_add<Fused>(middle, r4, low));
  }
};

// e^x for x <= 0, within 2 ulp; results below the smallest normal number are 0, NaN stays NaN.
// Range reduction x = n ln2 + r, |r| <= ln2 / 2, and a minimax polynomial: degree 7 of Cephes for
// float, degree 11 for double. Fused takes fma for speed, see there.
template <bool Fused = false, class V>
PYDENSE_HD V exp_nonpositive(V x) {
  using T = LaneOf<V>;
  using Traits = ExpTraits<T>;
  using Bits = Vec<BitsOf<T>, kLanesIn<V>>;
  constexpr T kOne = 1;
  const V round = broadcast<V>(Traits::kRound);
  const V shifted = multiply_add<Fused>(x, broadcast<V>(Traits::kLog2E), round);
  const V n = shifted - round;
  V r = multiply_add<Fused>(n, broadcast<V>(-Traits::kLn2High), x);
  r = multiply_add<Fused>(n, broadcast<V>(-Traits::kLn2Low), r);
  const V r2 = r * r;
  const V p = multiply_add<Fused>(Traits::template tail<Fused>(r, r2), r2, r) + broadcast<V>(kOne);
  // The low bits of `shifted` hold n: move them into the exponent.
  const V y = bit_cast<V>(bit_cast<Bits>(p) + (bit_cast<Bits>(shifted) << Traits::kMantissaBits));
  const V finite = x < Traits::kSmallest ? V{} : y;
  return x == x ? finite : x;
}

}  // namespace pydense::PYDENSE_ISA
