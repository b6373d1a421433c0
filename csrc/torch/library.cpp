// SPDX-License-Identifier: Apache-2.0
// What all operators of the torch door share. Each <op>_torch.cpp registers its own schema.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/build_info.h"
#include "common/cpu_isa.h"
#include "common/mapping.h"
#include "torch/memory.h"
#include "torch/tensor.h"

namespace pydense {
namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_hook = pthread_atfork(nullptr, nullptr, [] { forked = true; });

std::string library_version() { return build_info().version; }
void empty_cache() { drop_kept_mappings(); }
std::string cpu_capability() { return cpu_isa_name(current_cpu_isa()); }
void set_cpu_capability(const std::string& name) { set_cpu_isa(name); }
#ifdef PYDENSE_WITH_CUDA
bool serves_gpu(const Tensor& x) { return on_gpu(x); }
#endif
bool serves_cpu(const Tensor& /*x*/) { return false; }
Tensor scratch(const Tensor& like, const std::vector<int64_t>& size) {
  return new_dense(like, size, like.scalar_type(), false, Lifetime::kCall);
}
int64_t cached_bytes() { return static_cast<int64_t>(mapped_bytes().kept); }
int64_t max_cached_bytes() { return static_cast<int64_t>(max_kept_bytes()); }

}  // namespace

void torch_parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn) {
  if (forked) {
    serial_for(begin, end, grain, fn);
    return;
  }
  // torch would give every thread one equal part, and all would wait for the slowest: a thread that
  // is through takes the next piece instead.
  const int64_t step = std::max<int64_t>(grain, 1);
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), ceil_div(end - begin, step));
  std::atomic<int64_t> next{begin};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t first = next.fetch_add(step, std::memory_order_relaxed);
      if (first >= end) {
        return;
      }
      fn(first, std::min(first + step, end));
    }
  });
}

#ifdef PYDENSE_SIMT
void* current_cuda_stream(int32_t /*device*/) { return nullptr; }
#else
void* current_cuda_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get_stream == nullptr) {
    throw std::runtime_error("pydense: this torch was built without CUDA");
  }
  void* stream = nullptr;
  if (get_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("pydense: torch gave no CUDA stream for device " +
                             std::to_string(device));
  }
  return stream;
}
#endif

void require_dtype(const char* op, const char* name, const Tensor& x,
                   torch::headeronly::ScalarType dtype) {
  PYDENSE_CHECK(x.scalar_type() == dtype, op, ": ", name, " must be of dtype ",
                torch::headeronly::toString(dtype), ", got ",
                torch::headeronly::toString(x.scalar_type()));
}

}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def("_version() -> str");
  m.def("_empty_cache() -> ()");
  m.def("_cached_bytes() -> int");
  m.def("_max_cached_bytes() -> int");
  m.def("_scratch(Tensor like, int[] size) -> Tensor");  // for what a call needs and drops
  m.def("_cpu_capability() -> str");
  m.def("_set_cpu_capability(str name) -> ()");
  m.def(
      "_runs_cuda(Tensor x) -> bool");  // whether CUDA kernels serve a tensor, or those of the CPU
}
PYDENSE_TORCH_CPU(m) {
  m.impl("_runs_cuda", TORCH_BOX(&pydense::serves_cpu));
  m.impl("_scratch", TORCH_BOX(&pydense::scratch));
}
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) { m.impl("_runs_cuda", TORCH_BOX(&pydense::serves_gpu)); }
#endif
PYDENSE_TORCH_ANY(m) {
  m.impl("_version", TORCH_BOX(&pydense::library_version));
  m.impl("_empty_cache", TORCH_BOX(&pydense::empty_cache));
  m.impl("_cached_bytes", TORCH_BOX(&pydense::cached_bytes));
  m.impl("_max_cached_bytes", TORCH_BOX(&pydense::max_cached_bytes));
  m.impl("_cpu_capability", TORCH_BOX(&pydense::cpu_capability));
  m.impl("_set_cpu_capability", TORCH_BOX(&pydense::set_cpu_capability));
}
