// SPDX-License-Identifier: Apache-2.0
// New tensors, for *_torch.cpp files alone.
#pragma once

#include <span>

#include "common/mapping.h"
#include "torch/tensor.h"

namespace pydense {

// An uninitialised tensor on the device of `like`; channels last only with 4 dimensions. A large
// one on the CPU is a Buffer, whose pages serve the next one: fresh pages cost more than what is
// written to them. (Its storage cannot be resized, as that of torch.from_numpy.)
Tensor new_dense(const Tensor& like, std::span<const int64_t> size,
                 torch::headeronly::ScalarType dtype, bool channels_last = false,
                 Lifetime lifetime = Lifetime::kTensor);

}  // namespace pydense
