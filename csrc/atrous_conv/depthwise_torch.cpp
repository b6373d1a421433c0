// SPDX-License-Identifier: Apache-2.0
// Depthwise atrous convolution on torch tensors (N, C, H, W). A result has the memory format of x.
#include <array>
#include <optional>

#include "atrous_conv/depthwise.h"
#include "torch/memory.h"
#include "torch/picture.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

DepthwiseSource source_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor forward_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  int64_t height, int64_t width, int64_t dilation_y, int64_t dilation_x,
                  int64_t top, int64_t left, bool flipped, bool relu) {
  constexpr const char* kOp = "depthwise_atrous_conv2d";
  check_picture(kOp, "x", x, true);
  const FloatType dtype = float_type(kOp, "x", x);
  require_dtype(kOp, "weight", weight, x.scalar_type());
  require_same_device(kOp, "weight", weight, x);
  PYDENSE_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1, kOp,
                ": weight must have shape (", x.size(1), ", 1, kH, kW), got ", weight.dim(),
                " dimensions or another size");
  std::optional<Tensor> shift;
  if (bias.has_value()) {
    require_dtype(kOp, "bias", *bias, x.scalar_type());
    require_same_device(kOp, "bias", *bias, x);
    PYDENSE_CHECK(bias->dim() == 1 && bias->size(0) == x.size(1), kOp, ": bias must have shape (",
                  x.size(1), "), got ", bias->dim(), " dimensions or another size");
    shift = as_contiguous(*bias);
  }
  const bool last = is_channels_last(x);
  const DepthwiseShape shape = {
      x.size(0),      x.size(1),  x.size(2),  x.size(3), height, width, weight.size(2),
      weight.size(3), dilation_y, dilation_x, top,       left,   last};
  PYDENSE_CHECK(height >= 1 && width >= 1, kOp, ": output size must be at least 1, got (", height,
                ", ", width, ")");
  const Tensor rows = with_contiguous_rows(x, last);
  const Tensor kernel = as_contiguous(weight);
  Tensor out = new_picture(x, height, width, x.scalar_type(), last);
  const DepthwiseArgs args = {shape,
                              source_of(rows),
                              kernel.const_data_ptr(),
                              shift.has_value() ? shift->const_data_ptr() : nullptr,
                              out.mutable_data_ptr(),
                              flipped,
                              relu};
  run_where(
      x, [&](auto device, void* stream) { depthwise_cuda(kOp, dtype, args, device, stream); },
      [&] { depthwise(kOp, dtype, args, torch_parallel_for); });
  return out;
}

Tensor gradient_op(const Tensor& grad, const Tensor& x, int64_t kernel_height, int64_t kernel_width,
                   int64_t dilation_y, int64_t dilation_x, int64_t top, int64_t left) {
  constexpr const char* kOp = "depthwise_atrous_conv2d_weight_gradient";
  check_picture(kOp, "grad", grad, true);
  check_picture(kOp, "x", x, true);
  const FloatType dtype = float_type(kOp, "x", x);
  require_dtype(kOp, "grad", grad, x.scalar_type());
  require_same_device(kOp, "grad", grad, x);
  PYDENSE_CHECK(grad.size(0) == x.size(0) && grad.size(1) == x.size(1), kOp,
                ": grad must have batch and channels of x, ", x.size(0), " and ", x.size(1),
                ", got ", grad.size(0), " and ", grad.size(1));
  const bool last = is_channels_last(x);
  const DepthwiseShape shape = {x.size(0),    x.size(1),     x.size(2),    x.size(3),  grad.size(2),
                                grad.size(3), kernel_height, kernel_width, dilation_y, dilation_x,
                                top,          left,          last};
  PYDENSE_CHECK(kernel_height >= 1 && kernel_width >= 1, kOp,
                ": kernel size must be at least 1, got (", kernel_height, ", ", kernel_width, ")");
  const Tensor rows = with_contiguous_rows(x, last);
  const Tensor grad_rows = with_contiguous_rows(grad, last);
  const std::array<int64_t, 4> size = {x.size(1), 1, kernel_height, kernel_width};
  Tensor weight = new_dense(x, size, x.scalar_type());
  const DepthwiseGradientArgs args = {shape, source_of(grad_rows), source_of(rows),
                                      weight.mutable_data_ptr()};
  run_where(
      x,
      [&](auto device, void* stream) {
        const std::array<int64_t, 1> sums = {depthwise_gradient_sums(kOp, shape)};
        const bool wide = dtype == FloatType::kFloat64;
        const Tensor workspace = new_dense(x, sums, wide ? ScalarType::Double : ScalarType::Float);
        depthwise_gradient_cuda(kOp, dtype, args, workspace.mutable_data_ptr(), device, stream);
      },
      [&] { depthwise_weight_gradient(kOp, dtype, args, torch_parallel_for); });
  return weight;
}

// Each serves both devices.
void register_depthwise(torch::stable::detail::StableLibrary& m) {
  m.impl("depthwise_atrous_conv2d", TORCH_BOX(&forward_op));
  m.impl("depthwise_atrous_conv2d_weight_gradient", TORCH_BOX(&gradient_op));
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "depthwise_atrous_conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt height, SymInt width, "
      "SymInt dilation_y, SymInt dilation_x, SymInt top, SymInt left, bool flipped, bool relu) "
      "-> Tensor");
  m.def(
      "depthwise_atrous_conv2d_weight_gradient(Tensor grad, Tensor x, SymInt kernel_height, "
      "SymInt kernel_width, SymInt dilation_y, SymInt dilation_x, SymInt top, SymInt left) "
      "-> Tensor");
}
PYDENSE_TORCH_CPU(m) { pydense::register_depthwise(m); }
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) { pydense::register_depthwise(m); }
#endif
