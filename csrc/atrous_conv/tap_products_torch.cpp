// SPDX-License-Identifier: Apache-2.0
// The products of summed atrous convolutions on torch tensors.
#include <initializer_list>
#include <optional>
#include <vector>

#include "atrous_conv/tap_products.h"
#include "torch/picture.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

// The type of sums.
ScalarType sum_type(const Tensor& picture) {
  return picture.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
// What stacks are multiplied as.
ScalarType stack_type(const Tensor& picture) {
  return picture.scalar_type() == ScalarType::BFloat16 && multiplies_bf16_pairs()
             ? ScalarType::BFloat16
             : sum_type(picture);
}

TapProductShape checked_shape(const char* op, const Tensor& grad, const char* grad_name,
                              const Tensor& x, const char* x_name, const std::vector<int64_t>& rows,
                              const std::vector<int64_t>& columns) {
  check_picture(op, x_name, x, false);
  check_picture(op, grad_name, grad, false);
  require_dtype(op, grad_name, grad, x.scalar_type());
  for (const int64_t axis : {0, 2, 3}) {
    PYDENSE_CHECK(grad.size(axis) == x.size(axis), op, ": ", grad_name, " must have size ",
                  x.size(axis), " as ", x_name, " in dimension ", axis, ", got ", grad.size(axis));
  }
  PYDENSE_CHECK(rows.size() == columns.size(), op, ": columns must be as many as rows, ",
                rows.size(), ", got ", columns.size());
  return {{grad.size(1), grad.size(2), grad.size(3), static_cast<int64_t>(rows.size()), rows.data(),
           columns.data(), false},
          x.size(0),
          x.size(1),
          is_channels_last(x)};
}

void check_stack(const char* op, const char* name, const Tensor& stack, ScalarType dtype,
                 const TapProductShape& shape) {
  require_dtype(op, name, stack, dtype);
  PYDENSE_CHECK(stack.is_cpu() && stack.is_contiguous() && stack.dim() == 2 &&
                    stack.size(0) == shape.taps.taps * shape.taps.outputs &&
                    stack.size(1) == shape.channels,
                op, ": ", name, " must be contiguous, on the CPU and have shape (",
                shape.taps.taps * shape.taps.outputs, ", ", shape.channels, "), got ", stack.dim(),
                " dimensions or another size");
}

void check_dense(const char* op, const char* name, const Tensor& x, bool channels_last) {
  int64_t stride = 1;
  for (const int64_t axis :
       {channels_last ? 1 : 3, channels_last ? 3 : 2, channels_last ? 2 : 1, 0}) {
    PYDENSE_CHECK(x.size(axis) == 1 || x.stride(axis) == stride, op, ": ", name,
                  " must be dense, got stride ", x.stride(axis), " in dimension ", axis);
    stride *= x.size(axis);
  }
}

void products_op(const Tensor& out, const Tensor& x, const Tensor& stack,
                 const std::optional<Tensor>& bias, int64_t workspace,
                 const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  constexpr const char* kOp = "_tap_products";
  const TapProductShape shape = checked_shape(kOp, out, "out", x, "x", rows, columns);
  check_stack(kOp, "stack", stack, stack_type(x), shape);
  std::optional<Tensor> shift;
  if (bias.has_value()) {
    require_dtype(kOp, "bias", *bias, sum_type(x));
    require_same_device(kOp, "bias", *bias, out);
    PYDENSE_CHECK(bias->dim() == 1 && bias->size(0) == shape.taps.outputs, kOp,
                  ": bias must have shape (", shape.taps.outputs, "), got ", bias->dim(),
                  " dimensions or another size");
    shift = as_contiguous(*bias);
  }
  const Tensor picture = as_dense(x, shape.channels_last);
  tap_products(kOp, float_type(kOp, "x", x),
               {shape,
                picture.const_data_ptr(),
                stack.const_data_ptr(),
                shift.has_value() ? shift->const_data_ptr() : nullptr,
                {out.mutable_data_ptr(), out.stride(1), out.stride(2), out.stride(3)},
                out.stride(0),
                workspace},
               torch_parallel_for);
}

void picture_op(const Tensor& grad_x, const Tensor& grad, const Tensor& stack,
                const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  constexpr const char* kOp = "_tap_picture_gradient";
  const TapProductShape shape = checked_shape(kOp, grad, "grad", grad_x, "grad_x", rows, columns);
  check_stack(kOp, "stack", stack, stack_type(grad_x), shape);
  check_dense(kOp, "grad_x", grad_x, shape.channels_last);
  const Tensor planes = as_contiguous(grad);
  tap_picture_gradient(
      kOp, float_type(kOp, "grad", grad),
      {shape, planes.const_data_ptr(), stack.const_data_ptr(), grad_x.mutable_data_ptr()},
      torch_parallel_for);
}

void stack_op(const Tensor& grad_stack, const Tensor& grad, const Tensor& x,
              const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  constexpr const char* kOp = "_tap_stack_gradient";
  const TapProductShape shape = checked_shape(kOp, grad, "grad", x, "x", rows, columns);
  check_stack(kOp, "grad_stack", grad_stack, sum_type(x), shape);
  const Tensor planes = as_contiguous(grad);
  const Tensor picture = as_dense(x, shape.channels_last);
  tap_stack_gradient(
      kOp, float_type(kOp, "grad", grad),
      {shape, planes.const_data_ptr(), picture.const_data_ptr(), grad_stack.mutable_data_ptr()},
      torch_parallel_for);
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "_tap_products(Tensor(a!) out, Tensor x, Tensor stack, Tensor? bias, int workspace, "
      "int[] rows, int[] columns) -> ()");
  m.def(
      "_tap_picture_gradient(Tensor(a!) grad_x, Tensor grad, Tensor stack, int[] rows, "
      "int[] columns) -> ()");
  m.def(
      "_tap_stack_gradient(Tensor(a!) grad_stack, Tensor grad, Tensor x, int[] rows, "
      "int[] columns) -> ()");
}
PYDENSE_TORCH_CPU(m) {
  m.impl("_tap_products", TORCH_BOX(&pydense::products_op));
  m.impl("_tap_picture_gradient", TORCH_BOX(&pydense::picture_op));
  m.impl("_tap_stack_gradient", TORCH_BOX(&pydense::stack_op));
}
