// SPDX-License-Identifier: Apache-2.0
// Tensors (N, C, H, W), for *_torch.cpp files alone.
#pragma once

#include "common/float_type.h"
#include "torch/tensor.h"

namespace pydense {

// Throws std::invalid_argument for all other dtypes.
FloatType float_type(const char* op, const char* name, const Tensor& x);

// torch's suggest_memory_format: whether the strides are those of channels last, gaps allowed.
bool is_channels_last(const Tensor& x);

// Whether it has four dimensions and lies on the CPU or, where `cuda` is set, on a GPU.
void check_picture(const char* op, const char* name, const Tensor& x, bool cuda);

void require_same_device(const char* op, const char* name, const Tensor& x, const Tensor& first);

// x itself where it is dense in that format, else a copy.
Tensor as_dense(const Tensor& x, bool channels_last);

// x itself where the pixels of its rows lie side by side, else a dense copy.
Tensor with_contiguous_rows(const Tensor& x, bool channels_last);

// An uninitialised picture with the batch and channels of `like`.
Tensor new_picture(const Tensor& like, int64_t height, int64_t width,
                   torch::headeronly::ScalarType dtype, bool channels_last);

}  // namespace pydense
