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

// Asks for huge pages where a new tensor is large: fresh 4 KB pages cost more than what is written
// to them.
void on_huge_pages(const Tensor& fresh);

// An uninitialised picture with the batch and channels of `like`.
Tensor new_picture(const Tensor& like, int64_t height, int64_t width,
                   torch::headeronly::ScalarType dtype, bool channels_last);

}  // namespace pydense
