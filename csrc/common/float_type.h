// SPDX-License-Identifier: Apache-2.0
// What an array of floating-point numbers holds, for the doors of rooms: nvcc reads this file too.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pydense {

// 16-bit numbers as they lie in memory; half.h has their arithmetic.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// float, double, BFloat16, Half.
enum class FloatType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The type that a kernel computes in for numbers stored as S.
template <class S>
using ComputeOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

}  // namespace pydense
