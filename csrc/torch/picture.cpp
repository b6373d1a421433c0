// SPDX-License-Identifier: Apache-2.0
#include "torch/picture.h"

#include <array>

#include "torch/memory.h"

namespace pydense {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

FloatType float_type(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::Double:
      return FloatType::kFloat64;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kFloat16;
    default:
      throw_invalid_argument(op, ": ", name,
                             " must be of dtype Float, Double, BFloat16 or Half, got ",
                             torch::headeronly::toString(x.scalar_type()));
  }
}

bool is_channels_last(const Tensor& x) {
  if (x.stride(1) == 0) {
    return false;
  }
  int64_t least = 0;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (x.size(axis) == 0 || x.stride(axis) < least) {
      return false;
    }
    if (axis == 0 && least == x.stride(1)) {  // N x 1 x 1 x 1
      return false;
    }
    least = x.stride(axis) * (x.stride(axis) > 1 ? x.size(axis) : 1);
  }
  return true;
}

void check_picture(const char* op, const char* name, const Tensor& x, bool cuda) {
  PYDENSE_CHECK(x.dim() == 4, op, ": ", name,
                " must have 4 dimensions (batch, channels, height, width), got ", x.dim());
  PYDENSE_CHECK(x.is_cpu() || (cuda && on_gpu(x)), op, ": ", name, " must be on the CPU",
                cuda ? " or a CUDA device" : "", ", got another device");
}

void require_same_device(const char* op, const char* name, const Tensor& x, const Tensor& first) {
  PYDENSE_CHECK(x.is_cpu() == first.is_cpu() && x.get_device_index() == first.get_device_index(),
                op, ": ", name, " must be on one device");
}

Tensor as_dense(const Tensor& x, bool channels_last) {
  return torch::stable::contiguous(
      x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor with_contiguous_rows(const Tensor& x, bool channels_last) {
  const auto fits = [&](int64_t axis, int64_t stride) {
    return x.size(axis) == 1 || x.stride(axis) == stride;
  };
  const bool contiguous = channels_last ? fits(1, 1) && fits(3, x.size(1)) : fits(3, 1);
  return contiguous ? x : as_dense(x, channels_last);
}

Tensor new_picture(const Tensor& like, int64_t height, int64_t width, ScalarType dtype,
                   bool channels_last) {
  const std::array<int64_t, 4> size = {like.size(0), like.size(1), height, width};
  return new_dense(like, size, dtype, channels_last);
}

}  // namespace pydense
