// SPDX-License-Identifier: Apache-2.0
// The floating-point numbers that an array may hold; for CUDA units too, which cannot include
// common/half.h.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pydense {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What an array holds: float, double, BFloat16, Half.
enum class FloatType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The type that a kernel computes in for numbers stored as S.
template <class S>
using ComputeOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

}  // namespace pydense
