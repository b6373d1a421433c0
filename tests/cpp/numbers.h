// SPDX-License-Identifier: Apache-2.0
// Numbers of every type that kernels take, as tests see them.
#pragma once

#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "common/cpu_isa.h"
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

// Small whole numbers, of `values` different ones around 0: sums of their products are exact.
template <class S>
std::vector<S> whole_numbers(int64_t count, unsigned seed, int values) {
  std::mt19937 random(seed);
  std::vector<S> result(static_cast<size_t>(count));
  for (S& to : result) {
    const int value = static_cast<int>(random() % static_cast<unsigned>(values)) - values / 2;
    pydense::portable::store_as(&to, static_cast<pydense::ComputeOf<S>>(value));
  }
  return result;
}

template <class S>
bool same_bytes(const std::vector<S>& a, const std::vector<S>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0);
}

// check.operator()<S>() for each type, on each instruction set that this machine has.
template <class Check>
void on_every_isa(const Check& check) {
  for (const pydense::CpuIsa isa : pydense::available_cpu_isas()) {
    pydense::set_cpu_isa(pydense::cpu_isa_name(isa));
    check.template operator()<float>();
    check.template operator()<double>();
    check.template operator()<pydense::BFloat16>();
    check.template operator()<pydense::Half>();
  }
}

}  // namespace testing
