// SPDX-License-Identifier: Apache-2.0
// What the operators of this room ask of tensors, for *_torch.cpp files alone.
#pragma once

#include "chained_residual_pool/max_pool.h"
#include "torch/picture.h"

namespace pydense {

inline void require_shape(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  for (int64_t axis = 0; axis < 4; ++axis) {
    PYDENSE_CHECK(x.size(axis) == like.size(axis), op, ": ", name, " must have ", like.size(axis),
                  " elements along axis ", axis, ", got ", x.size(axis));
  }
}

inline PoolSource pool_source(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// A size that int does not hold is refused as 0.
inline PoolShape pool_shape(const Tensor& x, int64_t size, bool channels_last) {
  return {x.size(0), x.size(1),     x.size(2),
          x.size(3), channels_last, size > 0 && size <= kMaxPoolSize ? static_cast<int>(size) : 0};
}

}  // namespace pydense
