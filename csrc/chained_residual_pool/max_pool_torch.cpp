// SPDX-License-Identifier: Apache-2.0
// max_pool2d_same on torch tensors (N, C, H, W). A result has the memory format of the input, by
// torch's own rule, and so have the offsets.
#include <optional>
#include <tuple>

#include "chained_residual_pool/arguments_torch.h"
#include "chained_residual_pool/max_pool.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

void run_backward(const char* op, FloatType dtype, const MaxPoolBackwardArgs& args,
                  const Tensor& like) {
  run_where(
      like,
      [&](auto device, void* stream) { max_pool_backward_cuda(op, dtype, args, device, stream); },
      [&] { max_pool_backward(op, dtype, args, torch_parallel_for); });
}

std::tuple<Tensor, std::optional<Tensor>> forward(const char* op, const Tensor& x, int64_t size,
                                                  bool with_offsets) {
  check_picture(op, "x", x, true);
  const FloatType dtype = float_type(op, "x", x);
  const bool last = is_channels_last(x);
  const PoolShape shape = pool_shape(x, size, last);
  check_pool_shape(op, shape);
  const Tensor rows = with_contiguous_rows(x, last);
  Tensor out = new_picture(x, x.size(2), x.size(3), x.scalar_type(), last);
  std::optional<Tensor> offsets;
  if (with_offsets) {
    offsets = new_picture(x, x.size(2), x.size(3), ScalarType::Byte, last);
  }
  run_max_pool(op, dtype,
               {shape, pool_source(rows), out.mutable_data_ptr(),
                with_offsets ? static_cast<uint8_t*>(offsets->mutable_data_ptr()) : nullptr},
               x);
  return {out, offsets};
}

Tensor forward_op(const Tensor& x, int64_t kernel_size) {
  return std::get<0>(forward("max_pool2d_same", x, kernel_size, false));
}

std::tuple<Tensor, Tensor> forward_with_offsets_op(const Tensor& x, int64_t kernel_size) {
  const auto [out, offsets] = forward("max_pool2d_same_with_offsets", x, kernel_size, true);
  return {out, *offsets};
}

Tensor backward_op(const Tensor& grad, const Tensor& offsets, const std::optional<Tensor>& addend,
                   int64_t kernel_size) {
  constexpr const char* kOp = "max_pool2d_same_backward";
  check_picture(kOp, "grad", grad, true);
  const FloatType dtype = float_type(kOp, "grad", grad);
  check_picture(kOp, "offsets", offsets, true);
  require_dtype(kOp, "offsets", offsets, ScalarType::Byte);
  require_shape(kOp, "offsets", offsets, grad);
  require_same_device(kOp, "offsets", offsets, grad);
  const bool last = is_channels_last(offsets);
  const PoolShape shape = pool_shape(grad, kernel_size, last);
  check_pool_shape(kOp, shape);
  const Tensor rows = with_contiguous_rows(grad, last);
  const Tensor codes = as_dense(offsets, last);
  std::optional<Tensor> more;
  if (addend.has_value()) {
    check_picture(kOp, "addend", *addend, true);
    require_dtype(kOp, "addend", *addend, grad.scalar_type());
    require_shape(kOp, "addend", *addend, grad);
    require_same_device(kOp, "addend", *addend, grad);
    more = as_dense(*addend, last);
  }
  Tensor result = new_picture(grad, grad.size(2), grad.size(3), grad.scalar_type(), last);
  run_backward(kOp, dtype,
               {shape, pool_source(rows), static_cast<const uint8_t*>(codes.const_data_ptr()),
                more.has_value() ? more->const_data_ptr() : nullptr, result.mutable_data_ptr()},
               grad);
  return result;
}

// Each serves both devices.
void register_max_pool(torch::stable::detail::StableLibrary& m) {
  m.impl("max_pool2d_same", TORCH_BOX(&forward_op));
  m.impl("max_pool2d_same_with_offsets", TORCH_BOX(&forward_with_offsets_op));
  m.impl("max_pool2d_same_backward", TORCH_BOX(&backward_op));
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def("max_pool2d_same(Tensor x, int kernel_size) -> Tensor");
  m.def("max_pool2d_same_with_offsets(Tensor x, int kernel_size) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_same_backward(Tensor grad, Tensor offsets, Tensor? addend, int kernel_size) "
      "-> Tensor");
}
PYDENSE_TORCH_CPU(m) { pydense::register_max_pool(m); }
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) { pydense::register_max_pool(m); }
#endif
