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

inline void run_max_pool(const char* op, FloatType dtype, const MaxPoolArgs& args,
                         const Tensor& like) {
  run_where(
      like,
      [&](auto device, void* stream) { max_pool_forward_cuda(op, dtype, args, device, stream); },
      [&] { max_pool_forward(op, dtype, args, torch_parallel_for); });
}

inline void check_conv1x1_weight(const char* op, const char* name, const Tensor& weight,
                                 const Tensor& x) {
  require_dtype(op, name, weight, x.scalar_type());
  require_same_device(op, name, weight, x);
  const int64_t channels = x.size(1);
  PYDENSE_CHECK(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == channels &&
                    weight.size(2) == 1 && weight.size(3) == 1,
                op, ": ", name, " must have shape (", channels, ", ", channels, ", 1, 1), got ",
                weight.dim(), " dimensions or another size");
}

}  // namespace pydense
