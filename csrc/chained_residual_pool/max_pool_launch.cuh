// SPDX-License-Identifier: Apache-2.0
// What the launchers of max pooling share.
#pragma once

#include <type_traits>

#include "chained_residual_pool/max_pool.h"
#include "common/picture_launch.cuh"

namespace pydense {

inline int64_t pool_unit(const PoolShape& shape) {
  return shape.channels_last ? shape.channels : 1;
}

// Whether vectors of so many elements can be moved from rows of a source; those of a dense picture
// begin at multiples of them.
inline bool pool_rows_are_aligned(const PoolShape& shape, const PoolSource& from, size_t element,
                                  int vector) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride % vector == 0; };
  return (shape.channels_last ? shape.channels : shape.width) % vector == 0 &&
         reinterpret_cast<uintptr_t>(from.data) % (element * static_cast<size_t>(vector)) == 0 &&
         fits(shape.batches, from.batch) && fits(shape.height, from.row) &&
         (shape.channels_last || fits(shape.channels, from.channel));
}

inline bool pool_is_aligned(const void* data, size_t element, int vector) {
  return reinterpret_cast<uintptr_t>(data) % (element * static_cast<size_t>(vector)) == 0;
}

// Calls fn(std::integral_constant<int, size>{}) for the usual size of the window, else with 0.
template <class Fn>
void with_pool_size(int size, const Fn& fn) {
  if (size == 5) {
    fn(std::integral_constant<int, 5>{});
  } else {
    fn(std::integral_constant<int, 0>{});
  }
}

}  // namespace pydense
