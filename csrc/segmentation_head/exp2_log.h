// SPDX-License-Identifier: Apache-2.0
// 2^x and the natural logarithm of vectors, as a softmax needs them. Logits are multiplied with
// log2(e) while there are few of them, so that each of the many powers is that much cheaper.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace pydense::PYDENSE_ISA {

template <class V>
PYDENSE_HD V select_larger(const V& a, const V& b) {  // b where one of them is NaN
  return a > b ? a : b;
}

template <class T>
struct Exp2Traits;
template <>
struct Exp2Traits<float> {
  static constexpr float kRound = 12582912.F;  // 1.5 * 2^23: adding it rounds to whole numbers
  static constexpr float kSmallest = -126.F;
  static constexpr int kMantissaBits = 23;
  static constexpr int kDegree = 5;
  // Of (2^r - 1) / r on [-1/2, 1/2]: 2^r within 9.2e-8, 3.5e-18 for double.
  static constexpr float kCoefficients[kDegree] = {0.69314698F, 0.24022242F, 0.055507337F,
                                                   0.0096715126F, 0.0013264727F};
};
template <>
struct Exp2Traits<double> {
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kSmallest = -1022.0;
  static constexpr int kMantissaBits = 52;
  static constexpr int kDegree = 11;
  static constexpr double kCoefficients[kDegree] = {
      0.6931471805599453,    0.2402265069591013,   0.05550410866482009,    0.009618129107594062,
      0.0013333558146772623, 0.00015403530457187,  1.5252733495034153e-05, 1.321543524508164e-06,
      1.017819880641478e-07, 7.07378956491808e-09, 4.434879170558345e-10};
};

// 2^x for x <= 0. Below the smallest normal number it stays at that; NaN stays NaN.
template <class V>
PYDENSE_HD V exp2_nonpositive(const V& at) {
  using T = LaneOf<V>;
  using Traits = Exp2Traits<T>;
  using Bits = Vec<BitsOf<T>, kLanesIn<V>>;
  const V x = select_larger(broadcast<V>(Traits::kSmallest), at);
  const V shifted = x + broadcast<V>(Traits::kRound);
  const V r = x - (shifted - broadcast<V>(Traits::kRound));
  V p = broadcast<V>(Traits::kCoefficients[Traits::kDegree - 1]);
#pragma GCC unroll 12
  for (int k = Traits::kDegree - 2; k >= 0; --k) {
    p = fma(p, r, broadcast<V>(Traits::kCoefficients[k]));
  }
  constexpr T kOne = 1;
  p = fma(p, r, broadcast<V>(kOne));
  // The low bits of `shifted` hold the whole part: move them into the exponent.
  return bit_cast<V>(bit_cast<Bits>(p) + (bit_cast<Bits>(shifted) << Traits::kMantissaBits));
}

// log(x) of positive normal numbers; NaN stays NaN. The polynomial is that of Cephes.
template <class V>
PYDENSE_HD V log_positive(const V& x) {
  using T = LaneOf<V>;
  if constexpr (sizeof(T) == 8) {
    V result = {};
    for (int l = 0; l < kLanesIn<V>; ++l) {
      result[l] = std::log(x[l]);
    }
    return result;
  } else {
    using Int = Vec<int32_t, kLanesIn<V>>;
    constexpr int32_t kSqrtHalf = 0x3F3504F3;
    const Int bits = bit_cast<Int>(x);
    const Int exponent = (bits - kSqrtHalf) >> 23;  // x = m 2^exponent, m from sqrt(1/2) to sqrt(2)
    const V m = bit_cast<V>(bits - (exponent << 23));
    const V n = __builtin_convertvector(exponent, V);
    const V f = m - broadcast<V>(1.F);
    constexpr float kCoefficients[] = {7.0376836292e-2F,  -1.1514610310e-1F, 1.1676998740e-1F,
                                       -1.2420140846e-1F, 1.4249322787e-1F,  -1.6668057665e-1F,
                                       2.0000714765e-1F,  -2.4999993993e-1F, 3.3333331174e-1F};
    V p = broadcast<V>(kCoefficients[0]);
#pragma GCC unroll 9
    for (int k = 1; k < 9; ++k) {
      p = fma(p, f, broadcast<V>(kCoefficients[k]));
    }
    const V f2 = f * f;
    const V tail = fma(f2 * f, p, n * broadcast<V>(-2.12194440e-4F));
    const V result = fma(n, broadcast<V>(0.693359375F), f + fma(f2, broadcast<V>(-0.5F), tail));
    return x == x ? result : x;
  }
}

}  // namespace pydense::PYDENSE_ISA
