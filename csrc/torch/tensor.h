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

// Whether the CUDA kernels serve this tensor. Under the shim they do, on tensors of the CPU.
inline bool on_gpu(const Tensor& x) {
#ifdef PYDENSE_SIMT
  return x.is_cpu();
#else
  return x.is_cuda();
#endif
}

// cuda(device, stream) for a tensor that CUDA kernels serve, else cpu(). `cuda` is generic (auto
// device): where no CUDA kernels are built, nothing in it need exist.
template <class Cuda, class Cpu>
void run_where(const Tensor& like, [[maybe_unused]] const Cuda& cuda, const Cpu& cpu) {
#ifdef PYDENSE_WITH_CUDA
  if (on_gpu(like)) {
    const int32_t device = like.get_device_index();
    return cuda(device, current_cuda_stream(device));
  }
#else
  static_cast<void>(like);
#endif
  cpu();
}

void require_dtype(const char* op, const char* name, const Tensor& x,
                   torch::headeronly::ScalarType dtype);

}  // namespace pydense

// How a room registers: PYDENSE_TORCH_SCHEMAS(m) { m.def(...); }, PYDENSE_TORCH_CPU(m) and
// PYDENSE_TORCH_CUDA(m) { m.impl(...); }. For tests, the same file is compiled again with
// PYDENSE_SIMT: then the implementations for CUDA, whose kernels the shim runs on the CPU, become
// the operators of pydense_simt.
#ifndef PYDENSE_SIMT
#define PYDENSE_TORCH_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(pydense, m)
#define PYDENSE_TORCH_CPU(m) STABLE_TORCH_LIBRARY_IMPL(pydense, CPU, m)
#define PYDENSE_TORCH_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(pydense, CUDA, m)
#define PYDENSE_TORCH_ANY(m) STABLE_TORCH_LIBRARY_IMPL(pydense, CompositeExplicitAutograd, m)
#else
#define PYDENSE_TORCH_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(pydense_simt, m)
#define PYDENSE_TORCH_CPU(m) PYDENSE_TORCH_UNUSED(m, C10_UID)
#define PYDENSE_TORCH_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(pydense_simt, CPU, m)
#define PYDENSE_TORCH_ANY(m) STABLE_TORCH_LIBRARY_IMPL(pydense_simt, CompositeExplicitAutograd, m)
#define PYDENSE_TORCH_UNUSED(m, uid)            \
  [[maybe_unused]] static void C10_CONCATENATE( \
      pydense_unused_, uid)([[maybe_unused]] torch::stable::detail::StableLibrary & m)
#endif
