// SPDX-License-Identifier: Apache-2.0
// Weights of dense convolutions as torch tensors, packed ones too; for *_torch.cpp files alone.
#pragma once

#include "atrous_conv/dense.h"
#include "torch/picture.h"

namespace pydense {

// weight is [outputs, channels, kH, kW], or the other way round where it is `transposed`, for the
// gradient.
DenseConvWeight dense_weight_of(const Tensor& weight, bool transposed);

// The taps of an output and channel lie in order, at one distance: weight itself or a copy.
Tensor with_even_taps(const Tensor& weight);

// Where the panels of a packed weight begin, which _pack_dense_atrous_weight made of a weight for
// this shape and the device of x. Throws std::invalid_argument for anything else.
const void* dense_panels(const char* op, const Tensor& packed, const Tensor& x, FloatType dtype,
                         const DenseConvShape& shape, bool transposed);

// Workspace on the device of x.
Tensor new_bytes(const Tensor& x, int64_t bytes);

}  // namespace pydense
