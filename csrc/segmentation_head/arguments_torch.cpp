// SPDX-License-Identifier: Apache-2.0
#include "segmentation_head/arguments_torch.h"

#include <sstream>

#include "torch/memory.h"

namespace pydense {

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

void require_device_of(const char* op, const char* name, const Tensor& x, const Tensor& logits) {
  PYDENSE_CHECK(x.device() == logits.device(), op, ": ", name,
                " must be on the device of logits, got another device");
}

LogitsView view_logits(const char* op, const Tensor& logits) {
  PYDENSE_CHECK(logits.dim() == 4, op,
                ": logits must have 4 dimensions (batch, classes, height, width), got ",
                logits.dim());
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

Tensor new_array(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return new_dense(like, {shape.begin(), shape.size()}, dtype);
}

Tensor new_in_format_of(const Tensor& x, int64_t height, int64_t width, ScalarType dtype) {
  return new_picture(x, height, width, dtype, is_channels_last(x));
}

void copy_strides(const Tensor& x, int64_t* strides) {
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    strides[axis] = x.stride(axis);
  }
}

}  // namespace pydense
