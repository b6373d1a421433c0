// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/exact_filter.h"
#include "torch/memory.h"
#include "torch/picture.h"

namespace pydense {
namespace {

constexpr const char* kOp = "exact_gaussian_filter";

void check_array(const char* name, const Tensor& x) {
  PYDENSE_CHECK(x.dim() == 3, kOp, ": ", name, " must have 3 dimensions, got ", x.dim());
  PYDENSE_CHECK(x.is_cpu() || x.is_cuda(), kOp, ": ", name,
                " must be on the CPU or a GPU (cuda), got another device");
}

template <class T>
void run(const Tensor& values, const Tensor& features, bool self_term, Tensor& out) {
  ExactFilterArgs<T> args{features.const_data_ptr<T>(),
                          values.const_data_ptr<T>(),
                          out.mutable_data_ptr<T>(),
                          values.size(0),
                          features.size(0),
                          values.size(1),
                          values.size(2),
                          features.size(1),
                          {},
                          {},
                          self_term};
  for (int64_t axis = 0; axis < 3; ++axis) {
    args.feature_strides[axis] = features.stride(axis);
    args.value_strides[axis] = values.stride(axis);
  }
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
  check_array("values", values);
  check_array("features", features);
  require_same_device(kOp, "features", features, values);
  const ScalarType dtype = values.scalar_type();
  PYDENSE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp,
                ": values must be of dtype Float or Double, got ",
                torch::headeronly::toString(dtype));
  require_dtype(kOp, "features", features, dtype);
  PYDENSE_CHECK(features.size(2) == values.size(2), kOp, ": features must have ", values.size(2),
                " points as the values have, got ", features.size(2));
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
