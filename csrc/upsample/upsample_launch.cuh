// SPDX-License-Identifier: Apache-2.0
// What the launchers of upsampling share.
#pragma once

#include "common/picture_launch.cuh"
#include "upsample/upsample.h"

namespace pydense {

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
