// SPDX-License-Identifier: Apache-2.0
// Maps of taps on torch tensors; the matrix products around them are torch's, called from Python.
#include <optional>
#include <vector>

#include "atrous_conv/tap_maps.h"
#include "torch/picture.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

// Maps are of the picture's dtype, or float for pictures of 16 bits.
bool is_wide(const char* op, const Tensor& maps, const Tensor& picture, FloatType dtype) {
  const bool narrow = dtype == FloatType::kBFloat16 || dtype == FloatType::kFloat16;
  if (!narrow || maps.scalar_type() != ScalarType::Float) {
    require_dtype(op, "maps", maps, picture.scalar_type());
    return false;
  }
  return true;
}

TapMaps checked_maps(const char* op, const Tensor& maps, const Tensor& picture,
                     const char* picture_name, const std::vector<int64_t>& rows,
                     const std::vector<int64_t>& columns) {
  PYDENSE_CHECK(picture.dim() == 3, op, ": ", picture_name,
                " must have 3 dimensions (channels, height, width), got ", picture.dim());
  PYDENSE_CHECK(picture.is_cpu() && maps.is_cpu(), op, ": ", picture_name,
                " and maps must be on the CPU, got another device");
  const FloatType dtype = float_type(op, picture_name, picture);
  PYDENSE_CHECK(rows.size() == columns.size(), op, ": columns must be as many as rows, ",
                rows.size(), ", got ", columns.size());
  PYDENSE_CHECK(maps.dim() == 4 && maps.is_contiguous(), op,
                ": maps must be contiguous and have 4 dimensions, got ", maps.dim());
  const auto taps = static_cast<int64_t>(rows.size());
  PYDENSE_CHECK(
      maps.size(0) == taps && maps.size(1) == picture.size(0) && maps.size(3) == picture.size(2),
      op, ": maps must have shape (", taps, ", ", picture.size(0), ", rows, ", picture.size(2),
      "), got (", maps.size(0), ", ", maps.size(1), ", ", maps.size(2), ", ", maps.size(3), ")");
  return {picture.size(0),
          picture.size(1),
          picture.size(2),
          taps,
          rows.data(),
          columns.data(),
          is_wide(op, maps, picture, dtype)};
}

void sum_op(const Tensor& out, const Tensor& maps, const std::optional<Tensor>& bias,
            const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  constexpr const char* kOp = "_tap_sum";
  const TapMaps shape = checked_maps(kOp, maps, out, "out", rows, columns);
  PYDENSE_CHECK(maps.size(2) == shape.height, kOp, ": maps must have ", shape.height, " rows, got ",
                maps.size(2));
  std::optional<Tensor> shift;
  if (bias.has_value()) {
    require_dtype(kOp, "bias", *bias,
                  out.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    require_same_device(kOp, "bias", *bias, out);
    PYDENSE_CHECK(bias->dim() == 1 && bias->size(0) == shape.outputs, kOp,
                  ": bias must have shape (", shape.outputs, "), got ", bias->dim(),
                  " dimensions or another size");
    shift = as_contiguous(*bias);
  }
  tap_sum(kOp, float_type(kOp, "out", out),
          {shape,
           maps.const_data_ptr(),
           shift.has_value() ? shift->const_data_ptr() : nullptr,
           {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)}},
          torch_parallel_for);
}

void spread_op(const Tensor& maps, const Tensor& grad, int64_t first,
               const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  constexpr const char* kOp = "_tap_spread";
  const TapMaps shape = checked_maps(kOp, maps, grad, "grad", rows, columns);
  const Tensor planes = as_contiguous(grad);
  tap_spread(kOp, float_type(kOp, "grad", grad),
             {shape, planes.const_data_ptr(), first, maps.size(2), maps.mutable_data_ptr()},
             torch_parallel_for);
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def("_tap_sum(Tensor(a!) out, Tensor maps, Tensor? bias, int[] rows, int[] columns) -> ()");
  m.def("_tap_spread(Tensor(a!) maps, Tensor grad, int first, int[] rows, int[] columns) -> ()");
}
PYDENSE_TORCH_CPU(m) {
  m.impl("_tap_sum", TORCH_BOX(&pydense::sum_op));
  m.impl("_tap_spread", TORCH_BOX(&pydense::spread_op));
}
