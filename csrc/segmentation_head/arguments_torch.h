// SPDX-License-Identifier: Apache-2.0
// What the operators of this room share at the torch door, for *_torch.cpp files alone: checks,
// views and new tensors.
#pragma once

#include <initializer_list>

#include "segmentation_head/segmentation_head.h"
#include "torch/picture.h"

namespace pydense {

IntegerType integer_type(const char* op, const Tensor& x);

void check_shape(const char* op, const char* name, const Tensor& x,
                 std::initializer_list<int64_t> shape);

void require_device_of(const char* op, const char* name, const Tensor& x, const Tensor& logits);

LogitsView view_logits(const char* op, const Tensor& logits);

// Before anything of this size exists.
void check_size(const char* op, const char* name, const LogitsView& logits, int64_t height,
                int64_t width);

Tensor new_array(const Tensor& like, std::initializer_list<int64_t> shape,
                 torch::headeronly::ScalarType dtype);

// A picture with the memory format of x.
Tensor new_in_format_of(const Tensor& x, int64_t height, int64_t width,
                        torch::headeronly::ScalarType dtype);

void copy_strides(const Tensor& x, int64_t* strides);

// Calls fn(float{}) or fn(double{}): the type of the arithmetic.
template <class Fn>
auto with_arithmetic(const LogitsView& logits, const Fn& fn) {
  return logits.type == FloatType::kFloat64 ? fn(double{}) : fn(float{});
}

// For CPU kernels.
template <class T>
struct Axes {
  AxisTable<T> y;
  AxisTable<T> x;
  Axes(const LogitsView& logits, int64_t height, int64_t width, bool align_corners)
      : y(interpolation_axis(logits.height, height, align_corners)),
        x(interpolation_axis(logits.width, width, align_corners)) {}
};

// For CUDA kernels.
template <class T>
HeadAxes<T> head_axes(const LogitsView& logits, int64_t height, int64_t width, bool align_corners) {
  return {portable::interpolate_axis<T>(logits.height, height, align_corners, 0),
          portable::interpolate_axis<T>(logits.width, width, align_corners, 0)};
}

template <class T>
torch::headeronly::ScalarType dtype_of() {
  return sizeof(T) == 8 ? torch::headeronly::ScalarType::Double
                        : torch::headeronly::ScalarType::Float;
}

}  // namespace pydense
