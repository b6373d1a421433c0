// SPDX-License-Identifier: Apache-2.0
// What the launchers of upsampling share.
#pragma once

#include <type_traits>

#include "common/launch.cuh"
#include "upsample/upsample.h"

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

// Whether every row of a picture begins at a multiple of `vector` elements.
inline bool rows_are_aligned(const UpsampleShape& shape, const void* data,
                             const PictureStrides& strides, size_t element, int vector) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride % vector == 0; };
  return reinterpret_cast<uintptr_t>(data) % (element * static_cast<size_t>(vector)) == 0 &&
         fits(shape.batches, strides.batch) &&
         (shape.channels_last || fits(shape.channels, strides.channel)) &&
         strides.row % vector == 0;
}

// The least power of 2 that is not below n, but not above `most`, itself a power of 2.
inline unsigned covering_power(int64_t n, unsigned most) {
  unsigned power = 1;
  while (power < n && power < most) {
    power *= 2;
  }
  return power;
}

constexpr int64_t kMaxGridY = 65535;

// Blocks that fill any of today's GPUs some times over. More planes than these go through blocks
// that have their taps already.
constexpr int64_t kEnoughBlocks = 8192;

}  // namespace pydense
