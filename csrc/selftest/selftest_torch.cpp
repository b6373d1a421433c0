// SPDX-License-Identifier: Apache-2.0
#include "selftest/selftest.h"
#include "torch/tensor.h"

namespace pydense {
namespace {

SelftestArgs make_args(const Tensor& x, Tensor& y) {
  return {x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.numel()};
}

Tensor selftest_cpu_op(const Tensor& x_in) {
  require_dtype("selftest", "x", x_in, torch::headeronly::ScalarType::Float);
  const Tensor x = as_contiguous(x_in);
  Tensor y = torch::stable::empty_like(x);
  selftest_table().run(make_args(x, y), torch_parallel_for);
  return y;
}

#ifdef PYDENSE_WITH_CUDA
Tensor selftest_cuda_op(const Tensor& x_in) {
  require_dtype("selftest", "x", x_in, torch::headeronly::ScalarType::Float);
  const Tensor x = as_contiguous(x_in);
  Tensor y = torch::stable::empty_like(x);
  const int32_t device = x.get_device_index();
  selftest_cuda(make_args(x, y), device, current_cuda_stream(device));
  return y;
}
#endif

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) { m.def("_selftest(Tensor x) -> Tensor"); }
PYDENSE_TORCH_CPU(m) { m.impl("_selftest", TORCH_BOX(&pydense::selftest_cpu_op)); }
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) { m.impl("_selftest", TORCH_BOX(&pydense::selftest_cuda_op)); }
#endif
