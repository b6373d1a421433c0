// SPDX-License-Identifier: Apache-2.0
// Numbers of every type that kernels take, as tests see them.
#pragma once

#include <type_traits>

#include "common/float_type.h"
#include "common/partial.h"

namespace testing {

template <class S>
constexpr pydense::FloatType kDtype =
    std::is_same_v<S, double>              ? pydense::FloatType::kFloat64
    : std::is_same_v<S, float>             ? pydense::FloatType::kFloat32
    : std::is_same_v<S, pydense::BFloat16> ? pydense::FloatType::kBFloat16
                                           : pydense::FloatType::kFloat16;

template <class S>
double read(const S& from) {
  return static_cast<double>(pydense::portable::load_as<pydense::ComputeOf<S>>(&from));
}

}  // namespace testing
