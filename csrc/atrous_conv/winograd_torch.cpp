// SPDX-License-Identifier: Apache-2.0
// Winograd's atrous convolutions on torch tensors. What is worth it is decided in Python
// (pydense/ops/_winograd.py).
#include <optional>
#include <utility>

#include "atrous_conv/winograd.h"
#include "torch/picture.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

void winograd_op(const Tensor& out, const Tensor& x, const Tensor& weight,
                 const std::optional<Tensor>& bias, int64_t rate, bool relu, bool flipped,
                 int64_t tile) {
  constexpr const char* kOp = "_winograd_atrous_conv2d";
  check_picture(kOp, "x", x, false);
  check_picture(kOp, "out", out, false);
  check_picture(kOp, "weight", weight, false);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"x", &x},
                                     std::pair<const char*, const Tensor*>{"out", &out},
                                     std::pair<const char*, const Tensor*>{"weight", &weight}}) {
    require_dtype(kOp, name, *tensor, ScalarType::Float);
  }
  const int64_t outputs = out.size(1);
  PYDENSE_CHECK(out.size(0) == x.size(0) && out.size(2) == x.size(2) && out.size(3) == x.size(3),
                kOp, ": out must have the sizes of x but for channels, got ", out.size(0), ", ",
                out.size(2), " and ", out.size(3));
  PYDENSE_CHECK(weight.size(flipped ? 1 : 0) == outputs &&
                    weight.size(flipped ? 0 : 1) == x.size(1) && weight.size(2) == 3 &&
                    weight.size(3) == 3,
                kOp, ": weight must have ", outputs, " outputs, ", x.size(1),
                " channels and 3 x 3 taps, got (", weight.size(0), ", ", weight.size(1), ", ",
                weight.size(2), ", ", weight.size(3), ")");
  std::optional<Tensor> shifts;
  if (bias.has_value()) {
    require_dtype(kOp, "bias", *bias, ScalarType::Float);
    require_same_device(kOp, "bias", *bias, x);
    PYDENSE_CHECK(bias->dim() == 1 && bias->size(0) == outputs, kOp, ": bias must have shape (",
                  outputs, "), got ", bias->dim(), " dimensions or another size");
    shifts = as_contiguous(*bias);
  }
  const bool last = is_channels_last(x);
  const Tensor picture = as_dense(x, last);
  const bool weight_last = !weight.is_contiguous() && is_channels_last(weight);
  const Tensor kernel = as_dense(weight, weight_last);
  const Tensor result = as_dense(out, last);
  PYDENSE_CHECK(result.const_data_ptr() == out.const_data_ptr(), kOp,
                ": out must be dense in the memory format of x, got other strides");
  winograd(kOp,
           {x.size(0), x.size(1), outputs, x.size(2), x.size(3), rate, static_cast<int>(tile), last,
            static_cast<const float*>(picture.const_data_ptr()),
            static_cast<const float*>(kernel.const_data_ptr()), flipped,
            shifts.has_value() ? static_cast<const float*>(shifts->const_data_ptr()) : nullptr,
            relu, static_cast<float*>(out.mutable_data_ptr()), weight_last},
           torch_parallel_for);
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "_winograd_atrous_conv2d(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, int rate, "
      "bool relu, bool flipped, int tile) -> ()");
}
PYDENSE_TORCH_CPU(m) { m.impl("_winograd_atrous_conv2d", TORCH_BOX(&pydense::winograd_op)); }
