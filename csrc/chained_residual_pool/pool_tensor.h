// SPDX-License-Identifier: Apache-2.0
// What the operators of this room ask of tensors, for *_torch.cpp files alone.
#pragma once

#include "chained_residual_pool/max_pool.h"
#include "torch/picture.h"

namespace pydense {

inline void check_pool_tensor(const char* op, const char* name, const Tensor& x) {
  PYDENSE_CHECK(x.dim() == 4, op, ": ", name,
                " must have 4 dimensions (batch, channels, height, width), got ", x.dim());
  PYDENSE_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU, got another device");
}

inline void require_shape(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  for (int64_t axis = 0; axis < 4; ++axis) {
    PYDENSE_CHECK(x.size(axis) == like.size(axis), op, ": ", name, " must have ", like.size(axis),
                  " elements along axis ", axis, ", got ", x.size(axis));
  }
}

inline Tensor dense(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(
      x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// x itself where the pixels of its rows lie side by side, else a dense copy.
inline Tensor with_contiguous_rows(const Tensor& x, bool channels_last) {
  const auto fits = [&](int64_t axis, int64_t stride) {
    return x.size(axis) == 1 || x.stride(axis) == stride;
  };
  const bool contiguous = channels_last ? fits(1, 1) && fits(3, x.size(1)) : fits(3, 1);
  return contiguous ? x : dense(x, channels_last);
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
