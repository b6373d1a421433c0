// SPDX-License-Identifier: Apache-2.0
// Operators of upsampling on torch tensors (N, C, H, W). A result has the memory format of the
// (first) input, by torch's own rule.
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "torch/picture.h"
#include "upsample/upsample.h"

namespace pydense {
namespace {

// `like` says where.
void run_forward(const char* op, FloatType dtype, const UpsampleArgs& args, const Tensor& like) {
  run_where(
      like,
      [&](auto device, void* stream) { upsample_forward_cuda(op, dtype, args, device, stream); },
      [&] { upsample_forward(op, dtype, args, torch_parallel_for); });
}

void run_backward(const char* op, FloatType dtype, const UpsampleBackwardArgs& args,
                  const Tensor& like) {
  run_where(
      like,
      [&](auto device, void* stream) { upsample_backward_cuda(op, dtype, args, device, stream); },
      [&] { upsample_backward(op, dtype, args, torch_parallel_for); });
}

PictureStrides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Dense strides, whatever the tensor says of axes with one element.
PictureStrides dense_strides(const Tensor& x, bool channels_last) {
  const int64_t channels = x.size(1);
  const int64_t rows = x.size(2);
  const int64_t columns = x.size(3);
  return {channels * rows * columns, channels_last ? 1 : rows * columns,
          channels_last ? columns * channels : columns};
}

Tensor checked_picture(const char* op, const Tensor& like, int64_t height, int64_t width,
                       bool channels_last) {
  check_upsample_size(op, height, width);
  const std::array<int64_t, 4> size = {like.size(0), like.size(1), height, width};
  int64_t bytes_at_most = sizeof(double);
  for (const int64_t n : size) {
    PYDENSE_CHECK(!__builtin_mul_overflow(bytes_at_most, std::max<int64_t>(n, 1), &bytes_at_most),
                  op, ": size must give a tensor of less than 2^63 bytes, got (", height, ", ",
                  width, ") for batch ", like.size(0), " and channels ", like.size(1));
  }
  return new_picture(like, height, width, like.scalar_type(), channels_last);
}

UpsampleShape shape_of(const Tensor& x, int64_t height, int64_t width, bool channels_last) {
  return {x.size(0), x.size(1), height, width, channels_last};
}

void* data_of(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

// Axes of one operator: from the sizes of input and output to the maps.
struct Axes {
  AxisSpec y;
  AxisSpec x;
};

Axes bilinear_axes(bool align_corners, double scale_y, double scale_x) {
  const AxisGrid grid = align_corners ? AxisGrid::kAlignCorners : AxisGrid::kHalfPixel;
  return {{grid, AxisBorder::kClamp, 0, 0, scale_y, 1, 0},
          {grid, AxisBorder::kClamp, 0, 0, scale_x, 1, 0}};
}

Axes crop_axes(const char* op, int64_t stride_y, int64_t stride_x, double offset_y, double offset_x,
               const std::string& border) {
  PYDENSE_CHECK(border == "zeros" || border == "clamp", op,
                ": border must be zeros or clamp, got '", border, "'");
  const AxisBorder kind = border == "zeros" ? AxisBorder::kZeros : AxisBorder::kClamp;
  return {{AxisGrid::kCrop, kind, 0, 0, 0, stride_y, offset_y},
          {AxisGrid::kCrop, kind, 0, 0, 0, stride_x, offset_x}};
}

Axes fuse_axes(const char* op, const std::string& mode, bool align_corners) {
  PYDENSE_CHECK(mode == "bilinear" || mode == "nearest", op,
                ": mode must be bilinear or nearest, got '", mode, "'");
  Axes axes = bilinear_axes(align_corners, 0, 0);
  if (mode == "nearest") {
    axes.y.grid = axes.x.grid = AxisGrid::kNearest;
  }
  return axes;
}

UpsampleInput input_of(const Tensor& x, const PictureStrides& strides, Axes axes, int64_t height,
                       int64_t width) {
  axes.y.in_size = x.size(2);
  axes.x.in_size = x.size(3);
  axes.y.out_size = height;
  axes.x.out_size = width;
  return {data_of(x), strides, axes.y, axes.x, false};
}

Tensor forward(const char* op, const Tensor& x, int64_t height, int64_t width, const Axes& axes) {
  check_picture(op, "x", x, true);
  const FloatType dtype = float_type(op, "x", x);
  const bool last = is_channels_last(x);
  const Tensor rows = with_contiguous_rows(x, last);
  Tensor out = checked_picture(op, x, height, width, last);
  const UpsampleInput input = input_of(rows, strides_of(rows), axes, height, width);
  run_forward(op, dtype,
              {shape_of(x, height, width, last), &input, 1, out.mutable_data_ptr(), false}, x);
  return out;
}

Tensor backward(const char* op, const Tensor& grad, int64_t height, int64_t width,
                const Axes& axes) {
  check_picture(op, "grad", grad, true);
  const FloatType dtype = float_type(op, "grad", grad);
  const bool last = is_channels_last(grad);
  const Tensor rows = with_contiguous_rows(grad, last);
  Tensor result = checked_picture(op, grad, height, width, last);
  const UpsampleInput input =
      input_of(result, dense_strides(result, last), axes, grad.size(2), grad.size(3));
  run_backward(op, dtype,
               {shape_of(grad, grad.size(2), grad.size(3), last), rows.const_data_ptr(),
                strides_of(rows), nullptr, &input, 1},
               grad);
  return result;
}

Tensor bilinear_op(const Tensor& x, int64_t height, int64_t width, bool align_corners,
                   double scale_y, double scale_x) {
  return forward("upsample_bilinear", x, height, width,
                 bilinear_axes(align_corners, scale_y, scale_x));
}

Tensor bilinear_backward_op(const Tensor& grad, int64_t height, int64_t width, bool align_corners,
                            double scale_y, double scale_x) {
  return backward("upsample_bilinear_backward", grad, height, width,
                  bilinear_axes(align_corners, scale_y, scale_x));
}

Tensor crop_op(const Tensor& x, int64_t height, int64_t width, int64_t stride_y, int64_t stride_x,
               double offset_y, double offset_x, const std::string& border) {
  constexpr const char* kOp = "upsample_crop";
  return forward(kOp, x, height, width,
                 crop_axes(kOp, stride_y, stride_x, offset_y, offset_x, border));
}

Tensor crop_backward_op(const Tensor& grad, int64_t height, int64_t width, int64_t stride_y,
                        int64_t stride_x, double offset_y, double offset_x,
                        const std::string& border) {
  constexpr const char* kOp = "upsample_crop_backward";
  return backward(kOp, grad, height, width,
                  crop_axes(kOp, stride_y, stride_x, offset_y, offset_x, border));
}

Tensor fuse_op(const std::vector<Tensor>& xs, int64_t height, int64_t width,
               const std::string& mode, bool align_corners, bool relu) {
  constexpr const char* kOp = "fuse_sum_upsample";
  PYDENSE_CHECK(!xs.empty() && xs.size() <= kMaxUpsampleInputs, kOp, ": inputs must be 1 to ",
                kMaxUpsampleInputs, " tensors, got ", xs.size());
  const Axes axes = fuse_axes(kOp, mode, align_corners);
  const Tensor& first = xs[0];
  check_picture(kOp, "inputs", first, true);
  const FloatType dtype = float_type(kOp, "inputs", first);
  const bool last = is_channels_last(first);
  std::vector<Tensor> pictures;
  std::vector<UpsampleInput> inputs;
  for (const Tensor& x : xs) {
    check_picture(kOp, "inputs", x, true);
    require_same_device(kOp, "inputs", x, first);
    require_dtype(kOp, "inputs", x, first.scalar_type());
    PYDENSE_CHECK(x.size(0) == first.size(0) && x.size(1) == first.size(1), kOp,
                  ": inputs must have batch ", first.size(0), " and channels ", first.size(1),
                  " as the first one, got ", x.size(0), " and ", x.size(1));
    const Tensor& rows = pictures.emplace_back(with_contiguous_rows(x, last));
    inputs.push_back(input_of(rows, strides_of(rows), axes, height, width));
    inputs.back().same_size = x.size(2) == height && x.size(3) == width;
  }
  Tensor out = checked_picture(kOp, first, height, width, last);
  run_forward(kOp, dtype,
              {shape_of(first, height, width, last), inputs.data(), static_cast<int>(inputs.size()),
               out.mutable_data_ptr(), relu},
              first);
  return out;
}

// heights, widths: of the gradients to make, at most one of them with the size of grad.
std::vector<Tensor> fuse_backward_op(const Tensor& grad, const std::optional<Tensor>& out,
                                     const std::vector<int64_t>& heights,
                                     const std::vector<int64_t>& widths, const std::string& mode,
                                     bool align_corners) {
  constexpr const char* kOp = "fuse_sum_upsample_backward";
  check_picture(kOp, "grad", grad, true);
  const FloatType dtype = float_type(kOp, "grad", grad);
  PYDENSE_CHECK(
      heights.size() == widths.size() && !heights.empty() && heights.size() <= kMaxUpsampleInputs,
      kOp, ": heights and widths must be 1 to ", kMaxUpsampleInputs, " each, got ", heights.size(),
      " and ", widths.size());
  const Axes axes = fuse_axes(kOp, mode, align_corners);
  const bool last = is_channels_last(grad);
  const Tensor rows = with_contiguous_rows(grad, last);
  std::optional<Tensor> mask;
  if (out.has_value()) {
    check_picture(kOp, "out", *out, true);
    require_same_device(kOp, "out", *out, grad);
    require_dtype(kOp, "out", *out, grad.scalar_type());
    for (int64_t axis = 0; axis < 4; ++axis) {
      PYDENSE_CHECK(out->size(axis) == grad.size(axis), kOp,
                    ": out must have the shape of grad, got ", out->size(axis), " instead of ",
                    grad.size(axis), " along axis ", axis);
    }
    mask = as_dense(*out, last);
  }
  std::vector<Tensor> results;
  std::vector<UpsampleInput> inputs;
  bool same = false;
  for (size_t k = 0; k < heights.size(); ++k) {
    const Tensor& result =
        results.emplace_back(checked_picture(kOp, grad, heights[k], widths[k], last));
    inputs.push_back(
        input_of(result, dense_strides(result, last), axes, grad.size(2), grad.size(3)));
    inputs.back().same_size = heights[k] == grad.size(2) && widths[k] == grad.size(3);
    PYDENSE_CHECK(!(inputs.back().same_size && same), kOp,
                  ": at most one gradient may have the size of grad");
    same = same || inputs.back().same_size;
  }
  run_backward(kOp, dtype,
               {shape_of(grad, grad.size(2), grad.size(3), last), rows.const_data_ptr(),
                strides_of(rows), mask.has_value() ? mask->const_data_ptr() : nullptr,
                inputs.data(), static_cast<int>(inputs.size())},
               grad);
  return results;
}

// Each serves both devices.
void register_upsample(torch::stable::detail::StableLibrary& m) {
  m.impl("upsample_bilinear", TORCH_BOX(&bilinear_op));
  m.impl("upsample_bilinear_backward", TORCH_BOX(&bilinear_backward_op));
  m.impl("upsample_crop", TORCH_BOX(&crop_op));
  m.impl("upsample_crop_backward", TORCH_BOX(&crop_backward_op));
  m.impl("fuse_sum_upsample", TORCH_BOX(&fuse_op));
  m.impl("fuse_sum_upsample_backward", TORCH_BOX(&fuse_backward_op));
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "upsample_bilinear(Tensor x, SymInt height, SymInt width, bool align_corners, "
      "float scale_y, float scale_x) -> Tensor");
  m.def(
      "upsample_bilinear_backward(Tensor grad, SymInt height, SymInt width, bool align_corners, "
      "float scale_y, float scale_x) -> Tensor");
  m.def(
      "upsample_crop(Tensor x, SymInt height, SymInt width, int stride_y, int stride_x, "
      "float offset_y, float offset_x, str border) -> Tensor");
  m.def(
      "upsample_crop_backward(Tensor grad, SymInt height, SymInt width, int stride_y, "
      "int stride_x, float offset_y, float offset_x, str border) -> Tensor");
  m.def(
      "fuse_sum_upsample(Tensor[] inputs, SymInt height, SymInt width, str mode, "
      "bool align_corners, bool relu) -> Tensor");
  m.def(
      "fuse_sum_upsample_backward(Tensor grad, Tensor? out, SymInt[] heights, SymInt[] widths, "
      "str mode, bool align_corners) -> Tensor[]");
}
PYDENSE_TORCH_CPU(m) { pydense::register_upsample(m); }
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) { pydense::register_upsample(m); }
#endif
