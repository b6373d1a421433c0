// SPDX-License-Identifier: Apache-2.0
// Helpers over the LibTorch stable ABI, for *_torch.cpp files alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/parallel.h"

namespace pydense {

using torch::stable::Tensor;

// ParallelFor on torch's own pool; serial in a forked child, where that pool would hang.
void torch_parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn);

// The current cudaStream_t of a device. Looked up at run time, so that the library also loads into
// a torch without CUDA.
void* current_cuda_stream(int32_t device);

// torch::stable::contiguous goes through the dispatcher even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

void require_dtype(const char* op, const char* name, const Tensor& x,
                   torch::headeronly::ScalarType dtype);

}  // namespace pydense
