// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <string>

#include "segmentation_head/arguments_torch.h"
#include "segmentation_head/segmentation_head_cuda.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

// Elements that a strided array may touch, as a range of bytes.
struct ByteRange {
  uintptr_t begin;
  uintptr_t end;
};
ByteRange bytes_of(const Tensor& x) {
  int64_t first = 0;
  int64_t last = 0;
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    const int64_t reach = (x.size(axis) - 1) * x.stride(axis);
    (reach < 0 ? first : last) += reach;
  }
  const auto at = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const auto size = static_cast<int64_t>(x.element_size());
  return {at + static_cast<uintptr_t>(first * size),
          at + static_cast<uintptr_t>((last + 1) * size)};
}

// The result is written while other tasks read: neither may it lie on what is read, nor may two of
// its elements be one. Layouts that cannot be told apart from such by their strides are refused.
void check_written(const char* op, const Tensor& dst, const char* name, const Tensor& read) {
  std::array<int64_t, 4> axes = {0, 1, 2, 3};
  std::sort(axes.begin(), axes.end(),
            [&](int64_t a, int64_t b) { return dst.stride(a) < dst.stride(b); });
  int64_t reach = 0;
  for (const int64_t axis : axes) {
    PYDENSE_CHECK(dst.size(axis) <= 1 || dst.stride(axis) > reach, op,
                  ": dst must not share memory between its elements, got stride ", dst.stride(axis),
                  " along axis ", axis);
    reach += std::max<int64_t>(dst.size(axis) - 1, 0) * dst.stride(axis);
  }
  if (dst.numel() > 0 && read.numel() > 0) {
    const ByteRange a = bytes_of(dst);
    const ByteRange b = bytes_of(read);
    PYDENSE_CHECK(a.end <= b.begin || b.end <= a.begin, op, ": dst must not share memory with ",
                  name, ", got arrays whose ranges overlap");
  }
}

std::tuple<Tensor, Tensor> upsample_argmax_op(const Tensor& logits, int64_t height, int64_t width,
                                              bool align_corners, const std::string& dtype,
                                              bool confidence) {
  constexpr const char* kOp = "upsample_argmax";
  const LogitsView view = view_logits(kOp, logits);
  check_size(kOp, "size", view, height, width);
  PYDENSE_CHECK(dtype == "uint8" || dtype == "int32" || dtype == "int64", kOp,
                ": dtype must be uint8, int32 or int64, got '", dtype, "'");
  const ScalarType type = dtype == "uint8"   ? ScalarType::Byte
                          : dtype == "int32" ? ScalarType::Int
                                             : ScalarType::Long;
  Tensor labels = new_array(logits, {view.images, height, width}, type);
  return with_arithmetic(view, [&]<class T>(T) {
    Tensor sure = new_array(logits, {confidence ? view.images : 0, height, width}, dtype_of<T>());
    T* const confidences = confidence ? sure.mutable_data_ptr<T>() : nullptr;
    const IntegerType label_type = integer_type(kOp, labels);
#ifdef PYDENSE_WITH_CUDA
    if (on_gpu(logits)) {
      const int32_t device = logits.get_device_index();
      upsample_argmax_cuda<T>({view, head_axes<T>(view, height, width, align_corners),
                               labels.mutable_data_ptr(), label_type, confidences},
                              device, current_cuda_stream(device));
      return std::make_tuple(labels, sure);
    }
#endif
    const Axes<T> axes(view, height, width, align_corners);
    upsample_argmax<T>({view, &axes.y, &axes.x, labels.mutable_data_ptr(), label_type, confidences},
                       torch_parallel_for);
    return std::make_tuple(labels, sure);
  });
}

Tensor upsample_softmax_op(const Tensor& logits, int64_t height, int64_t width,
                           bool align_corners) {
  constexpr const char* kOp = "upsample_softmax";
  const LogitsView view = view_logits(kOp, logits);
  check_size(kOp, "size", view, height, width);
  Tensor out = new_in_format_of(logits, height, width, logits.scalar_type());
  with_arithmetic(view, [&]<class T>(T) {
#ifdef PYDENSE_WITH_CUDA
    if (on_gpu(logits)) {
      UpsampleSoftmaxCudaArgs<T> args{
          view, head_axes<T>(view, height, width, align_corners), out.mutable_data_ptr(), {}};
      copy_strides(out, args.strides);
      const int32_t device = logits.get_device_index();
      return upsample_softmax_cuda(args, device, current_cuda_stream(device));
    }
#endif
    const Axes<T> axes(view, height, width, align_corners);
    UpsampleSoftmaxArgs<T> args{view,    &axes.y, &axes.x, {}, out.mutable_data_ptr(),
                                nullptr, nullptr, false};
    copy_strides(out, args.full_strides);
    upsample_softmax(args, torch_parallel_for);
  });
  return out;
}

Tensor upsample_softmax_backward_op(const Tensor& gradient, const Tensor& logits,
                                    bool align_corners) {
  constexpr const char* kOp = "upsample_softmax_backward";
  const LogitsView view = view_logits(kOp, logits);
  PYDENSE_CHECK(gradient.dim() == 4, kOp, ": gradient must have 4 dimensions, got ",
                gradient.dim());
  require_device_of(kOp, "gradient", gradient, logits);
  require_dtype(kOp, "gradient", gradient, logits.scalar_type());
  check_size(kOp, "gradient", view, gradient.size(2), gradient.size(3));
  check_shape(kOp, "gradient", gradient,
              {view.images, view.classes, gradient.size(2), gradient.size(3)});
  return with_arithmetic(view, [&]<class T>(T) {
    Tensor out = new_in_format_of(logits, view.height, view.width, dtype_of<T>());
#ifdef PYDENSE_WITH_CUDA
    if (on_gpu(logits)) {
      const auto axes = head_axes<T>(view, gradient.size(2), gradient.size(3), align_corners);
      Tensor parts = new_array(logits, {softmax_backward_parts(view, axes)}, dtype_of<T>());
      UpsampleSoftmaxBackwardCudaArgs<T> args{view,
                                              axes,
                                              gradient.const_data_ptr(),
                                              {},
                                              out.mutable_data_ptr<T>(),
                                              is_channels_last(logits),
                                              parts.mutable_data_ptr<T>()};
      copy_strides(gradient, args.strides);
      const int32_t device = logits.get_device_index();
      upsample_softmax_backward_cuda(args, device, current_cuda_stream(device));
      return out;
    }
#endif
    const Axes<T> axes(view, gradient.size(2), gradient.size(3), align_corners);
    UpsampleSoftmaxArgs<T> args{view,
                                &axes.y,
                                &axes.x,
                                {},
                                nullptr,
                                gradient.const_data_ptr(),
                                out.mutable_data_ptr<T>(),
                                is_channels_last(logits)};
    copy_strides(gradient, args.full_strides);
    upsample_softmax(args, torch_parallel_for);
    return out;
  });
}

void upsample_accumulate_op(const Tensor& dst, const Tensor& logits, int64_t y0, int64_t x0,
                            int64_t height, int64_t width, bool align_corners,
                            const Tensor& weight) {
  constexpr const char* kOp = "upsample_accumulate";
  const LogitsView view = view_logits(kOp, logits);
  check_size(kOp, "size", view, height, width);
  PYDENSE_CHECK(dst.dim() == 4 && dst.size(0) == view.images && dst.size(1) == view.classes, kOp,
                ": dst must have shape (", view.images, ", ", view.classes, ", H, W), got ",
                dst.dim(), " dimensions");
  PYDENSE_CHECK(y0 >= 0 && x0 >= 0 && height <= dst.size(2) - y0 && width <= dst.size(3) - x0, kOp,
                ": dst must hold the window, ", height, " x ", width, " at (", y0, ", ", x0,
                "), got ", dst.size(2), " x ", dst.size(3));
  check_shape(kOp, "weight", weight, {height, width});
  require_device_of(kOp, "dst", dst, logits);
  require_device_of(kOp, "weight", weight, logits);
  check_written(kOp, dst, "logits", logits);
  check_written(kOp, dst, "weight", weight);
  with_arithmetic(view, [&]<class T>(T) {
    require_dtype(kOp, "dst", dst, dtype_of<T>());
    require_dtype(kOp, "weight", weight, dtype_of<T>());
    T* const window = dst.mutable_data_ptr<T>() + y0 * dst.stride(2) + x0 * dst.stride(3);
#ifdef PYDENSE_WITH_CUDA
    if (on_gpu(logits)) {
      UpsampleAccumulateCudaArgs<T> args{view,
                                         head_axes<T>(view, height, width, align_corners),
                                         window,
                                         {},
                                         weight.const_data_ptr<T>(),
                                         {}};
      copy_strides(dst, args.strides);
      copy_strides(weight, args.weight_strides);
      const int32_t device = logits.get_device_index();
      return upsample_accumulate_cuda(args, device, current_cuda_stream(device));
    }
#endif
    const Axes<T> axes(view, height, width, align_corners);
    UpsampleAccumulateArgs<T> args{view, &axes.y, &axes.x, nullptr, {}, weight.const_data_ptr<T>(),
                                   {}};
    copy_strides(dst, args.out_strides);
    copy_strides(weight, args.weight_strides);
    args.out = window;
    upsample_accumulate(args, torch_parallel_for);
  });
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "upsample_argmax(Tensor logits, SymInt height, SymInt width, bool align_corners, str dtype, "
      "bool confidence) -> (Tensor, Tensor)");
  m.def(
      "upsample_softmax(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor");
  m.def("upsample_softmax_backward(Tensor gradient, Tensor logits, bool align_corners) -> Tensor");
  m.def(
      "upsample_accumulate(Tensor(a!) dst, Tensor logits, SymInt y0, SymInt x0, SymInt height, "
      "SymInt width, bool align_corners, Tensor weight) -> ()");
}
PYDENSE_TORCH_CPU(m) {
  m.impl("upsample_argmax", TORCH_BOX(&pydense::upsample_argmax_op));
  m.impl("upsample_softmax", TORCH_BOX(&pydense::upsample_softmax_op));
  m.impl("upsample_softmax_backward", TORCH_BOX(&pydense::upsample_softmax_backward_op));
  m.impl("upsample_accumulate", TORCH_BOX(&pydense::upsample_accumulate_op));
}
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) {
  m.impl("upsample_argmax", TORCH_BOX(&pydense::upsample_argmax_op));
  m.impl("upsample_softmax", TORCH_BOX(&pydense::upsample_softmax_op));
  m.impl("upsample_softmax_backward", TORCH_BOX(&pydense::upsample_softmax_backward_op));
  m.impl("upsample_accumulate", TORCH_BOX(&pydense::upsample_accumulate_op));
}
#endif
