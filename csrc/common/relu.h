// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/simd.h"

namespace pydense::PYDENSE_ISA {

// max(v, 0) where `relu`; a NaN stays one.
template <class V>
PYDENSE_HD V relu_of(const V& v, bool relu) {
  return relu ? (v < V{} ? V{} : v) : v;
}

}  // namespace pydense::PYDENSE_ISA
