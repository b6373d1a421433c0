// SPDX-License-Identifier: Apache-2.0
// Depthwise-separable atrous convolution on torch tensors (N, C, H, W). A result has the memory
// format of x.
#include <array>
#include <optional>

#include "atrous_conv/separable.h"
#include "torch/memory.h"
#include "torch/picture.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "atrous_separable_conv2d";

// Of `count` numbers, of the dtype and device of x.
std::optional<Tensor> checked_bias(const char* name, const std::optional<Tensor>& bias,
                                   int64_t count, const Tensor& x) {
  if (!bias.has_value()) {
    return std::nullopt;
  }
  require_dtype(kOp, name, *bias, x.scalar_type());
  require_same_device(kOp, name, *bias, x);
  PYDENSE_CHECK(bias->dim() == 1 && bias->size(0) == count, kOp, ": ", name, " must have shape (",
                count, "), got ", bias->dim(), " dimensions or another size");
  return as_contiguous(*bias);
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

Tensor separable_op(const Tensor& x, const Tensor& depthwise_weight,
                    const std::optional<Tensor>& depthwise_bias, const Tensor& pointwise_weight,
                    const std::optional<Tensor>& pointwise_bias, int64_t height, int64_t width,
                    int64_t dilation_y, int64_t dilation_x, int64_t top, int64_t left,
                    bool inner_relu, bool relu) {
  check_picture(kOp, "x", x, true);
  const FloatType dtype = float_type(kOp, "x", x);
  const int64_t channels = x.size(1);
  require_dtype(kOp, "depthwise_weight", depthwise_weight, x.scalar_type());
  require_same_device(kOp, "depthwise_weight", depthwise_weight, x);
  PYDENSE_CHECK(depthwise_weight.dim() == 4 && depthwise_weight.size(0) == channels &&
                    depthwise_weight.size(1) == 1,
                kOp, ": depthwise_weight must have shape (", channels, ", 1, kH, kW), got ",
                depthwise_weight.dim(), " dimensions or another size");
  require_dtype(kOp, "pointwise_weight", pointwise_weight, x.scalar_type());
  require_same_device(kOp, "pointwise_weight", pointwise_weight, x);
  PYDENSE_CHECK(pointwise_weight.dim() == 4 && pointwise_weight.size(1) == channels &&
                    pointwise_weight.size(2) == 1 && pointwise_weight.size(3) == 1,
                kOp, ": pointwise_weight must have shape (O, ", channels, ", 1, 1), got ",
                pointwise_weight.dim(), " dimensions or another size");
  const int64_t outputs = pointwise_weight.size(0);
  const auto inner = checked_bias("depthwise_bias", depthwise_bias, channels, x);
  const auto outer = checked_bias("pointwise_bias", pointwise_bias, outputs, x);
  PYDENSE_CHECK(height >= 1 && width >= 1, kOp, ": output size must be at least 1, got (", height,
                ", ", width, ")");
  const bool last = is_channels_last(x);
  const DepthwiseShape shape = {x.size(0),
                                channels,
                                x.size(2),
                                x.size(3),
                                height,
                                width,
                                depthwise_weight.size(2),
                                depthwise_weight.size(3),
                                dilation_y,
                                dilation_x,
                                top,
                                left,
                                last};
  const Tensor rows = with_contiguous_rows(x, last);
  const Tensor kernel = as_contiguous(depthwise_weight);
  const Tensor matrix = as_contiguous(pointwise_weight);
  const std::array<int64_t, 4> size = {x.size(0), outputs, height, width};
  Tensor out = new_dense(x, size, x.scalar_type(), last);
  SeparableArgs args = {shape,
                        {rows.const_data_ptr(), rows.stride(0), rows.stride(1), rows.stride(2)},
                        kernel.const_data_ptr(),
                        data_of(inner),
                        outputs,
                        matrix.const_data_ptr(),
                        data_of(outer),
                        out.mutable_data_ptr(),
                        inner_relu,
                        relu};
  run_where(
      x,
      [&](auto device, void* stream) {
        Tensor wide;
        if (outer.has_value()) {
          wide = torch::stable::to(*outer, ScalarType::Float);
          args.pointwise_bias = wide.const_data_ptr();
        }
        const std::array<int64_t, 1> bytes = {separable_cuda_workspace(kOp, dtype, args)};
        const Tensor workspace = new_dense(x, bytes, ScalarType::Byte);
        separable_cuda(kOp, dtype, args, workspace.mutable_data_ptr(), device, stream);
      },
      [&] { separable(kOp, dtype, args, torch_parallel_for); });
  return out;
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "atrous_separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor? depthwise_bias, "
      "Tensor pointwise_weight, Tensor? pointwise_bias, SymInt height, SymInt width, "
      "SymInt dilation_y, SymInt dilation_x, SymInt top, SymInt left, bool inner_relu, bool relu) "
      "-> Tensor");
}
PYDENSE_TORCH_CPU(m) { m.impl("atrous_separable_conv2d", TORCH_BOX(&pydense::separable_op)); }
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) { m.impl("atrous_separable_conv2d", TORCH_BOX(&pydense::separable_op)); }
#endif
