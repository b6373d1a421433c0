// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/exact_filter_torch.h"

#include "torch/memory.h"

namespace pydense {
namespace {

constexpr const char* kOp = "exact_gaussian_filter";

template <class T>
void run(const Tensor& values, const Tensor& features, bool self_term, Tensor& out) {
  const auto args = exact_filter_args<T>(values, features, self_term, out);
  check_exact_filter(args);
  if (out.numel() == 0) {
    return;
  }
  run_where(
      values,
      [&](auto device, void* stream) {
        const auto bytes = static_cast<int64_t>(exact_filter_workspace(args));
        const Tensor workspace =
            new_dense(values, {&bytes, 1}, torch::headeronly::ScalarType::Byte);
        exact_filter_cuda(args, workspace.mutable_data_ptr(), device, stream);
      },
      [&] { exact_filter(args, torch_parallel_for); });
}

Tensor exact_gaussian_filter_op(const Tensor& values, const Tensor& features, bool self_term) {
  using torch::headeronly::ScalarType;
  check_points(kOp, "values", values);
  check_points(kOp, "features", features);
  const ScalarType dtype = values.scalar_type();
  PYDENSE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp,
                ": values must be of dtype Float or Double, got ",
                torch::headeronly::toString(dtype));
  check_points_fit(kOp, values, features);
  Tensor out = torch::stable::new_empty(values, values.sizes());
  if (dtype == ScalarType::Float) {
    run<float>(values, features, self_term, out);
  } else {
    run<double>(values, features, self_term, out);
  }
  return out;
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def("exact_gaussian_filter(Tensor values, Tensor features, bool self_term) -> Tensor");
}
PYDENSE_TORCH_CPU(m) {
  m.impl("exact_gaussian_filter", TORCH_BOX(&pydense::exact_gaussian_filter_op));
}
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) {
  m.impl("exact_gaussian_filter", TORCH_BOX(&pydense::exact_gaussian_filter_op));
}
#endif
