// SPDX-License-Identifier: Apache-2.0
// What launchers of kernels on pictures share.
#pragma once

#include <type_traits>

#include "common/float_type.h"
#include "common/launch.cuh"

namespace pydense {

// Calls fn(T{}, std::bool_constant<channels_last>{}) with T the type in memory.
template <class Fn>
void with_picture_type(FloatType dtype, bool channels_last, const Fn& fn) {
  const auto with_format = [&](auto zero) {
    return channels_last ? fn(zero, std::true_type{}) : fn(zero, std::false_type{});
  };
  switch (dtype) {
    case FloatType::kFloat32:
      return with_format(float{});
    case FloatType::kFloat64:
      return with_format(double{});
    case FloatType::kBFloat16:
      return with_format(__nv_bfloat16{});
    case FloatType::kFloat16:
      return with_format(__half{});
  }
}

}  // namespace pydense
