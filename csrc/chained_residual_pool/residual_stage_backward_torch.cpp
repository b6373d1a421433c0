// SPDX-License-Identifier: Apache-2.0
// Gradients of a 1x1 convolution on torch tensors (N, C, H, W), C to C channels: what backward of
// chained_residual_pool consists of, beside the pool's.
#include <optional>
#include <vector>

#include "chained_residual_pool/arguments_torch.h"
#include "chained_residual_pool/residual_stage.h"
#include "chained_residual_pool/weight_gradient.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;
constexpr const char* kOp = "residual_stage_backward";

// [weight^T grad + addend, grad input^T, sums of grad]: those that are asked for.
std::vector<Tensor> backward(const Tensor& grad, const std::optional<Tensor>& input,
                             const Tensor& weight, const std::optional<Tensor>& addend,
                             bool need_input, bool need_weight, bool need_bias) {
  check_picture(kOp, "grad", grad, false);
  const FloatType dtype = float_type(kOp, "grad", grad);
  const int64_t channels = grad.size(1);
  check_conv1x1_weight(kOp, "weight", weight, grad);
  PYDENSE_CHECK(input.has_value() || !need_weight, kOp,
                ": input must be given where weight's gradient is needed, got None");
  const auto check_like_grad = [&](const char* name, const Tensor& x) {
    check_picture(kOp, name, x, false);
    require_dtype(kOp, name, x, grad.scalar_type());
    require_shape(kOp, name, x, grad);
  };
  const bool last = is_channels_last(grad);
  PoolShape shape = pool_shape(grad, kMinPoolSize, last);
  check_pool_shape(kOp, shape);
  shape.size = 1;
  const Tensor rows = with_contiguous_rows(grad, last);
  std::vector<Tensor> results;
  if (need_input) {
    Tensor result = new_picture(grad, grad.size(2), grad.size(3), grad.scalar_type(), last);
    const Tensor dense_weight = as_contiguous(weight);
    std::optional<Tensor> more;
    PoolSource added = {};
    if (addend.has_value()) {
      check_like_grad("addend", *addend);
      more = with_contiguous_rows(*addend, last);
      added = pool_source(*more);
    }
    residual_stage(kOp, dtype,
                   {shape, pool_source(rows), dense_weight.const_data_ptr(), nullptr, &added,
                    more.has_value() ? 1 : 0, result.mutable_data_ptr(), nullptr, nullptr, true},
                   torch_parallel_for);
    results.push_back(result);
  }
  WeightGradientArgs sums = {shape, pool_source(rows), {}, nullptr, nullptr};
  std::optional<Tensor> convolved;
  if (need_weight) {
    check_like_grad("input", *input);
    convolved = with_contiguous_rows(*input, last);
    sums.input = pool_source(*convolved);
    sums.weight = results
                      .emplace_back(torch::stable::new_empty(
                          grad, {channels, channels, 1, 1}, std::make_optional(grad.scalar_type())))
                      .mutable_data_ptr();
  }
  if (need_bias) {
    sums.bias = results
                    .emplace_back(torch::stable::new_empty(grad, {channels},
                                                           std::make_optional(grad.scalar_type())))
                    .mutable_data_ptr();
  }
  weight_gradient(dtype, sums, torch_parallel_for);
  return results;
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "residual_stage_backward(Tensor grad, Tensor? input, Tensor weight, Tensor? addend, "
      "bool need_input, bool need_weight, bool need_bias) -> Tensor[]");
}
PYDENSE_TORCH_CPU(m) { m.impl("residual_stage_backward", TORCH_BOX(&pydense::backward)); }
