// SPDX-License-Identifier: Apache-2.0
// A number known at run time as a template argument.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/hd.h"
#include "common/isa_namespace.h"

namespace pydense::PYDENSE_ISA {

template <int Value>
using IntConstant = std::integral_constant<int, Value>;

// Calls fn(IntConstant<n>{}) for n in [1, Max].
template <int Max, class Fn>
PYDENSE_HD void with_constant(int64_t n, const Fn& fn) {
  if constexpr (Max > 1) {
    if (n < Max) {
      return with_constant<Max - 1>(n, fn);
    }
  }
  fn(IntConstant<Max>{});
}

}  // namespace pydense::PYDENSE_ISA
