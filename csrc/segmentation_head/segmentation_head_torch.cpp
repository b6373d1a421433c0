// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "segmentation_head/segmentation_head.h"
#include "torch/picture.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

IntegerType integer_type(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Byte:
      return IntegerType::kUInt8;
    case ScalarType::Char:
      return IntegerType::kInt8;
    case ScalarType::Short:
      return IntegerType::kInt16;
    case ScalarType::Int:
      return IntegerType::kInt32;
    case ScalarType::Long:
      return IntegerType::kInt64;
    default:
      throw_invalid_argument(op, ": target must be of dtype Byte, Char, Short, Int or Long, got ",
                             torch::headeronly::toString(x.scalar_type()));
  }
}

void check_shape(const char* op, const char* name, const Tensor& x,
                 std::initializer_list<int64_t> shape) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < x.dim(); ++i) {
    fits = x.size(i) == shape.begin()[i];
  }
  if (!fits) {
    std::ostringstream text;
    text << op << ": " << name << " must have shape (";
    for (const int64_t size : shape) {
      text << size << ", ";
    }
    text << "), got (";
    for (int64_t i = 0; i < x.dim(); ++i) {
      text << x.size(i) << ", ";
    }
    throw_invalid_argument(text.str(), ")");
  }
}

LogitsView view_logits(const char* op, const Tensor& logits) {
  PYDENSE_CHECK(logits.dim() == 4, op,
                ": logits must have 4 dimensions (batch, classes, height, width), got ",
                logits.dim());
  PYDENSE_CHECK(logits.is_cpu(), op, ": logits must be on the CPU, got another device");
  LogitsView view = {logits.const_data_ptr(),
                     float_type(op, "logits", logits),
                     logits.size(0),
                     logits.size(1),
                     logits.size(2),
                     logits.size(3),
                     {}};
  PYDENSE_CHECK(view.classes >= 1 && view.height >= 1 && view.width >= 1, op,
                ": logits must have at least one class and one pixel, got ", view.classes, ", ",
                view.height, " x ", view.width);
  for (int64_t axis = 0; axis < 4; ++axis) {
    view.strides[axis] = logits.stride(axis);
  }
  return view;
}

// Calls fn(float{}) or fn(double{}): the type of the arithmetic.
template <class Fn>
auto with_arithmetic(const LogitsView& logits, const Fn& fn) {
  return logits.type == FloatType::kFloat64 ? fn(double{}) : fn(float{});
}

template <class T>
struct Axes {
  AxisTable<T> y;
  AxisTable<T> x;
  Axes(const LogitsView& logits, int64_t height, int64_t width, bool align_corners)
      : y(interpolation_axis(logits.height, height, align_corners)),
        x(interpolation_axis(logits.width, width, align_corners)) {}
};

// Before anything of this size exists.
void check_size(const char* op, const char* name, const LogitsView& logits, int64_t height,
                int64_t width) {
  constexpr int64_t kMost = AxisTable<float>::kMaxSize;
  const auto fits = [](int64_t size) { return size >= 1 && size <= kMost; };
  PYDENSE_CHECK(fits(logits.height) && fits(logits.width), op, ": logits must be of at most ",
                kMost, " pixels along an axis, got ", logits.height, " x ", logits.width);
  PYDENSE_CHECK(fits(height) && fits(width), op, ": ", name, " must be from 1 to ", kMost,
                " along an axis, got ", height, " x ", width);
  const double bytes = 8.0 * static_cast<double>(height) * static_cast<double>(width) *
                       static_cast<double>(logits.classes) * static_cast<double>(logits.images);
  PYDENSE_CHECK(bytes < 9e18, op, ": ", name, " must leave arrays below 2^63 bytes, got ", height,
                " x ", width, " for ", logits.images, " images of ", logits.classes, " classes");
}

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

template <class T>
ScalarType dtype_of() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

Tensor new_array(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const Tensor out = torch::stable::new_empty(like, shape, dtype);
  on_huge_pages(out);
  return out;
}

Tensor new_in_format_of(const Tensor& x, int64_t height, int64_t width, ScalarType dtype) {
  return new_picture(x, height, width, dtype, is_channels_last(x));
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
    const Axes<T> axes(view, height, width, align_corners);
    upsample_argmax<T>(
        {view, &axes.y, &axes.x, labels.mutable_data_ptr(), integer_type(kOp, labels),
         confidence ? sure.mutable_data_ptr<T>() : nullptr},
        torch_parallel_for);
    return std::make_tuple(labels, sure);
  });
}

void copy_strides(const Tensor& x, int64_t* strides) {
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    strides[axis] = x.stride(axis);
  }
}

Tensor upsample_softmax_op(const Tensor& logits, int64_t height, int64_t width,
                           bool align_corners) {
  constexpr const char* kOp = "upsample_softmax";
  const LogitsView view = view_logits(kOp, logits);
  check_size(kOp, "size", view, height, width);
  Tensor out = new_in_format_of(logits, height, width, logits.scalar_type());
  with_arithmetic(view, [&]<class T>(T) {
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
  PYDENSE_CHECK(gradient.dim() == 4 && gradient.is_cpu(), kOp,
                ": gradient must have 4 dimensions and be on the CPU, got ", gradient.dim());
  require_dtype(kOp, "gradient", gradient, logits.scalar_type());
  check_size(kOp, "gradient", view, gradient.size(2), gradient.size(3));
  check_shape(kOp, "gradient", gradient,
              {view.images, view.classes, gradient.size(2), gradient.size(3)});
  return with_arithmetic(view, [&]<class T>(T) {
    Tensor out = new_in_format_of(logits, view.height, view.width, dtype_of<T>());
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
  PYDENSE_CHECK(
      dst.dim() == 4 && dst.is_cpu() && dst.size(0) == view.images && dst.size(1) == view.classes,
      kOp, ": dst must have shape (", view.images, ", ", view.classes,
      ", H, W) and be on the CPU, got ", dst.dim(), " dimensions");
  PYDENSE_CHECK(y0 >= 0 && x0 >= 0 && height <= dst.size(2) - y0 && width <= dst.size(3) - x0, kOp,
                ": dst must hold the window, ", height, " x ", width, " at (", y0, ", ", x0,
                "), got ", dst.size(2), " x ", dst.size(3));
  check_shape(kOp, "weight", weight, {height, width});
  check_written(kOp, dst, "logits", logits);
  check_written(kOp, dst, "weight", weight);
  with_arithmetic(view, [&]<class T>(T) {
    require_dtype(kOp, "dst", dst, dtype_of<T>());
    require_dtype(kOp, "weight", weight, dtype_of<T>());
    const Axes<T> axes(view, height, width, align_corners);
    UpsampleAccumulateArgs<T> args{view, &axes.y, &axes.x, nullptr, {}, weight.const_data_ptr<T>(),
                                   {}};
    copy_strides(dst, args.out_strides);
    copy_strides(weight, args.weight_strides);
    args.out = dst.mutable_data_ptr<T>() + y0 * dst.stride(2) + x0 * dst.stride(3);
    upsample_accumulate(args, torch_parallel_for);
  });
}

enum class Reduction { kNone, kSum, kMean, kMeanAll };

Reduction parse_reduction(const std::string& name) {
  PYDENSE_CHECK(name == "none" || name == "sum" || name == "mean" || name == "mean_all",
                "upsample_cross_entropy: reduction must be none, sum, mean or mean_all, got '",
                name, "'");
  return name == "none"   ? Reduction::kNone
         : name == "sum"  ? Reduction::kSum
         : name == "mean" ? Reduction::kMean
                          : Reduction::kMeanAll;
}

template <class T>
const T* optional_data(const std::optional<Tensor>& x) {
  return x.has_value() ? x->const_data_ptr<T>() : nullptr;
}

// loss: (N, H, W) or (); gradient of the sum over the pixels, empty where it is not asked for; what
// the sum is multiplied with, in double, 0 where that would be 1 / 0; counts: (correct, valid).
std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_op(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& pixel_weight, bool align_corners, int64_t ignore_index,
    double label_smoothing, const std::string& reduction_name, bool gradient, bool count_correct) {
  constexpr const char* kOp = "upsample_cross_entropy";
  const LogitsView view = view_logits(kOp, logits);
  const Reduction reduction = parse_reduction(reduction_name);
  PYDENSE_CHECK(target.dim() == 3 && target.size(0) == view.images, kOp,
                ": target must have 3 dimensions and ", view.images, " images, got ", target.dim(),
                " dimensions and ", target.dim() > 0 ? target.size(0) : 0, " images");
  PYDENSE_CHECK(target.is_cpu(), kOp, ": target must be on the CPU, got another device");
  const int64_t height = target.size(1);
  const int64_t width = target.size(2);
  check_size(kOp, "target", view, height, width);
  const IntegerType target_type = integer_type(kOp, target);
  return with_arithmetic(view, [&]<class T>(T) {
    Tensor classes;
    if (weight.has_value()) {
      require_dtype(kOp, "weight", *weight, dtype_of<T>());
      check_shape(kOp, "weight", *weight, {view.classes});
      classes = as_contiguous(*weight);
    }
    if (pixel_weight.has_value()) {
      require_dtype(kOp, "pixel_weight", *pixel_weight, dtype_of<T>());
      check_shape(kOp, "pixel_weight", *pixel_weight, {view.images, height, width});
    }
    const bool per_pixel = reduction == Reduction::kNone;
    Tensor loss = per_pixel ? new_array(logits, {view.images, height, width}, dtype_of<T>())
                            : torch::stable::new_empty(logits, {}, dtype_of<T>());
    Tensor falls = gradient ? new_in_format_of(logits, view.height, view.width, dtype_of<T>())
                            : torch::stable::new_empty(logits, {0}, dtype_of<T>());
    Tensor scale = torch::stable::new_empty(logits, {}, ScalarType::Double);
    Tensor counts = torch::stable::new_empty(logits, {2}, ScalarType::Long);
    const Axes<T> axes(view, height, width, align_corners);
    UpsampleCrossEntropyArgs<T> args{view,
                                     &axes.y,
                                     &axes.x,
                                     target.const_data_ptr(),
                                     target_type,
                                     {target.stride(0), target.stride(1), target.stride(2)},
                                     ignore_index,
                                     weight.has_value() ? classes.const_data_ptr<T>() : nullptr,
                                     optional_data<T>(pixel_weight),
                                     {},
                                     label_smoothing,
                                     per_pixel ? loss.mutable_data_ptr<T>() : nullptr,
                                     gradient ? falls.mutable_data_ptr<T>() : nullptr,
                                     is_channels_last(logits),
                                     count_correct};
    if (pixel_weight.has_value()) {
      copy_strides(*pixel_weight, args.pixel_weight_strides);
    }
    const CrossEntropySums sums = upsample_cross_entropy(args, torch_parallel_for);
    const double by = reduction == Reduction::kMean ? sums.weight
                      : reduction == Reduction::kMeanAll
                          ? static_cast<double>(view.images * height * width)
                          : 1.0;
    *scale.mutable_data_ptr<double>() = by == 0 ? 0.0 : 1 / by;
    if (!per_pixel) {
      *loss.mutable_data_ptr<T>() = static_cast<T>(sums.loss / by);
    }
    counts.mutable_data_ptr<int64_t>()[0] = sums.correct;
    counts.mutable_data_ptr<int64_t>()[1] = sums.valid;
    return std::make_tuple(loss, falls, scale, counts);
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
  m.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, "
      "bool align_corners, int ignore_index, float label_smoothing, str reduction, bool gradient, "
      "bool count_correct) -> (Tensor, Tensor, Tensor, Tensor)");
}
PYDENSE_TORCH_CPU(m) {
  m.impl("upsample_argmax", TORCH_BOX(&pydense::upsample_argmax_op));
  m.impl("upsample_softmax", TORCH_BOX(&pydense::upsample_softmax_op));
  m.impl("upsample_softmax_backward", TORCH_BOX(&pydense::upsample_softmax_backward_op));
  m.impl("upsample_accumulate", TORCH_BOX(&pydense::upsample_accumulate_op));
  m.impl("upsample_cross_entropy", TORCH_BOX(&pydense::upsample_cross_entropy_op));
}
