// SPDX-License-Identifier: Apache-2.0
// What a GPU does around the products of summed atrous convolutions, on torch tensors. The products
// are torch's, called from Python.
#include <array>
#include <vector>

#include "atrous_conv/tap_gemm.h"
#include "torch/memory.h"
#include "torch/picture.h"

#ifdef PYDENSE_WITH_CUDA
namespace pydense {
namespace {

using torch::headeronly::ScalarType;

TapStrides strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

TapShifts shifts_of(const char* op, const char* name, const Tensor& picture,
                    const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  check_picture(op, name, picture, true);
  PYDENSE_CHECK(rows.size() == columns.size(), op, ": columns must be as many as rows, ",
                rows.size(), ", got ", columns.size());
  return {picture.size(0),
          picture.size(1),
          picture.size(2),
          picture.size(3),
          static_cast<int64_t>(rows.size()),
          rows.data(),
          columns.data()};
}

// Rows of a line for each line, or of lines for each pixel, of which `pixels` are made.
void check_maps(const char* op, const Tensor& maps, const Tensor& picture, const TapShifts& shape,
                int64_t pixels, bool channels_last) {
  require_dtype(op, "maps", maps, picture.scalar_type());
  require_same_device(op, "maps", maps, picture);
  const int64_t lines = shape.taps * shape.outputs;
  const int64_t rows = channels_last ? pixels : lines;
  PYDENSE_CHECK(maps.dim() == 3 && maps.is_contiguous() && maps.size(0) == shape.images &&
                    maps.size(1) == rows && maps.size(2) >= (channels_last ? lines : pixels),
                op, ": maps must be contiguous and have shape (", shape.images, ", ", rows,
                ", at least ", channels_last ? lines : pixels, "), got ", maps.dim(),
                " dimensions or another size");
}

void add_op(const Tensor& out, const Tensor& maps, const std::vector<Tensor>& biases,
            const std::vector<int64_t>& rows, const std::vector<int64_t>& columns,
            bool channels_last) {
  constexpr const char* kOp = "_tap_add";
  const TapShifts shape = shifts_of(kOp, "out", out, rows, columns);
  check_maps(kOp, maps, out, shape, shape.height * shape.width, channels_last);
  std::vector<Tensor> shifts;
  std::vector<const void*> data;
  for (const Tensor& bias : biases) {
    require_dtype(kOp, "biases", bias, out.scalar_type());
    require_same_device(kOp, "biases", bias, out);
    PYDENSE_CHECK(bias.dim() == 1 && bias.size(0) == shape.outputs, kOp,
                  ": biases must have shape (", shape.outputs, "), got ", bias.dim(),
                  " dimensions or another size");
    data.push_back(shifts.emplace_back(as_contiguous(bias)).const_data_ptr());
  }
  const int32_t device = out.get_device_index();
  tap_add_cuda(
      kOp, float_type(kOp, "out", out),
      {shape, maps.const_data_ptr(), maps.size(2), channels_last, static_cast<int>(data.size()),
       data.data(), out.mutable_data_ptr(), strides_of(out)},
      device, current_cuda_stream(device));
}

void gather_op(const Tensor& maps, const Tensor& grad, int64_t first, int64_t count,
               const std::vector<int64_t>& rows, const std::vector<int64_t>& columns,
               bool channels_last) {
  constexpr const char* kOp = "_tap_gather";
  const TapShifts shape = shifts_of(kOp, "grad", grad, rows, columns);
  check_maps(kOp, maps, grad, shape, count, channels_last);
  const int32_t device = grad.get_device_index();
  tap_gather_cuda(kOp, float_type(kOp, "grad", grad),
                  {shape, grad.const_data_ptr(), strides_of(grad), first, count,
                   maps.mutable_data_ptr(), maps.size(2), channels_last},
                  device, current_cuda_stream(device));
}

Tensor stack_op(const std::vector<Tensor>& weights, const std::vector<int64_t>& places,
                int64_t taps, int64_t first, int64_t count) {
  constexpr const char* kOp = "_tap_stack";
  PYDENSE_CHECK(!weights.empty() && places.size() == weights.size() * kBranchTaps, kOp,
                ": places must be 9 for each of the weights, got ", places.size(), " for ",
                weights.size());
  const Tensor& like = weights[0];
  std::vector<Tensor> kernels;
  std::vector<const void*> data;
  for (const Tensor& weight : weights) {
    check_picture(kOp, "weights", weight, true);
    require_dtype(kOp, "weights", weight, like.scalar_type());
    require_same_device(kOp, "weights", weight, like);
    PYDENSE_CHECK(weight.size(0) == like.size(0) && weight.size(1) == like.size(1) &&
                      weight.size(2) == 3 && weight.size(3) == 3,
                  kOp, ": weights must have shape (", like.size(0), ", ", like.size(1),
                  ", 3, 3), got (", weight.size(0), ", ", weight.size(1), ", ", weight.size(2),
                  ", ", weight.size(3), ")");
    data.push_back(kernels.emplace_back(as_contiguous(weight)).const_data_ptr());
  }
  PYDENSE_CHECK(first >= 0 && count >= 0 && first <= like.size(0) - count && taps >= 0, kOp,
                ": outputs must lie in [0, ", like.size(0), "), got ", count, " from ", first);
  Tensor stack =
      new_dense(like, std::array<int64_t, 2>{taps * count, like.size(1)}, like.scalar_type());
  const int32_t device = like.get_device_index();
  tap_stack_cuda(kOp, float_type(kOp, "weights", like),
                 {{taps, static_cast<int>(weights.size()), places.data()},
                  data.data(),
                  first,
                  count,
                  like.size(1),
                  stack.mutable_data_ptr()},
                 device, current_cuda_stream(device));
  return stack;
}

void unstack_op(const Tensor& weight, const Tensor& stack, const std::vector<int64_t>& places) {
  constexpr const char* kOp = "_tap_unstack";
  check_picture(kOp, "weight", weight, true);
  const FloatType dtype = float_type(kOp, "weight", weight);
  require_same_device(kOp, "stack", stack, weight);
  const bool wide = stack.scalar_type() == ScalarType::Float &&
                    (dtype == FloatType::kBFloat16 || dtype == FloatType::kFloat16);
  if (!wide) {
    require_dtype(kOp, "stack", stack, weight.scalar_type());
  }
  PYDENSE_CHECK(places.size() == kBranchTaps, kOp, ": places must be 9, got ", places.size());
  PYDENSE_CHECK(weight.is_contiguous() && weight.size(2) == 3 && weight.size(3) == 3, kOp,
                ": weight must be contiguous and have shape (O, C, 3, 3)");
  PYDENSE_CHECK(stack.dim() == 2 && stack.is_contiguous() && stack.size(1) == weight.size(1) &&
                    weight.size(0) > 0 && stack.size(0) % weight.size(0) == 0,
                kOp, ": stack must be contiguous and have shape (taps x ", weight.size(0), ", ",
                weight.size(1), "), got ", stack.dim(), " dimensions or another size");
  const int32_t device = weight.get_device_index();
  tap_unstack_cuda(kOp, dtype,
                   {stack.size(0) / weight.size(0), places.data(), wide, stack.const_data_ptr(),
                    weight.size(0), weight.size(1), weight.mutable_data_ptr()},
                   device, current_cuda_stream(device));
}

}  // namespace
}  // namespace pydense
#endif

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "_tap_add(Tensor(a!) out, Tensor maps, Tensor[] biases, int[] rows, int[] columns, "
      "bool channels_last) -> ()");
  m.def(
      "_tap_gather(Tensor(a!) maps, Tensor grad, int first, int count, int[] rows, "
      "int[] columns, bool channels_last) -> ()");
  m.def("_tap_stack(Tensor[] weights, int[] places, int taps, int first, int count) -> Tensor");
  m.def("_tap_unstack(Tensor(a!) weight, Tensor stack, int[] places) -> ()");
}
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) {
  m.impl("_tap_add", TORCH_BOX(&pydense::add_op));
  m.impl("_tap_gather", TORCH_BOX(&pydense::gather_op));
  m.impl("_tap_stack", TORCH_BOX(&pydense::stack_op));
  m.impl("_tap_unstack", TORCH_BOX(&pydense::unstack_op));
}
#endif
