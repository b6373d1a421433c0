// SPDX-License-Identifier: Apache-2.0
// The types of pictures, by their names and as numbers.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/float_type.h"

namespace simt {

template <class T>
constexpr pydense::FloatType kFloatType = pydense::FloatType::kFloat32;
template <>
constexpr pydense::FloatType kFloatType<double> = pydense::FloatType::kFloat64;
template <>
constexpr pydense::FloatType kFloatType<__nv_bfloat16> = pydense::FloatType::kBFloat16;
template <>
constexpr pydense::FloatType kFloatType<__half> = pydense::FloatType::kFloat16;

template <class T>
constexpr double kEpsilon = sizeof(T) == 8              ? 0x1p-52
                            : sizeof(T) == 4            ? 0x1p-23
                            : std::is_same_v<T, __half> ? 0x1p-10
                                                        : 0x1p-7;

template <class T>
double value(T x) {
  return static_cast<double>(pydense::to_accumulate(x));
}
template <class T>
T rounded(double x) {
  return pydense::from_accumulate<T>(static_cast<pydense::Accumulate<T>>(x));
}

}  // namespace simt
