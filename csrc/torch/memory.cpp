// SPDX-License-Identifier: Apache-2.0
#include "torch/memory.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "common/buffer.h"
#include "common/mapping.h"

namespace pydense {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

size_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:
      return 8;
  }
}

}  // namespace

Tensor new_dense(const Tensor& like, std::span<const int64_t> size, ScalarType dtype,
                 bool channels_last, Lifetime lifetime) {
  const torch::headeronly::IntHeaderOnlyArrayRef sizes(size.data(), size.size());
  size_t bytes = element_bytes(dtype);
  for (const int64_t n : size) {
    bytes = checked_bytes(bytes, static_cast<size_t>(n));
  }
  // Smaller tensors come from the heap, which reuses them. (It keeps what a call leaves behind.)
  constexpr size_t kLarge = size_t{4} << 20;
  const size_t least =
      lifetime == Lifetime::kCall ? kMinMappedBytes : std::max(kLarge, kMinMappedBytes);
  std::array<int64_t, 4> strides{};
  if (!like.is_cpu() || size.size() > strides.size() || bytes < least || max_kept_bytes() == 0) {
    return torch::stable::empty(
        sizes, dtype, std::nullopt, like.device(), std::nullopt,
        channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  int64_t stride = 1;
  const auto place = [&](size_t axis) {
    strides[axis] = stride;
    stride *= size[axis];  // not 0 here
  };
  if (channels_last) {
    place(1);
  }
  for (size_t axis = size.size(); axis-- > 0;) {
    if (!channels_last || axis != 1) {
      place(axis);
    }
  }
  Buffer memory(bytes, lifetime);
  void* const data = memory.data();
  return torch::stable::from_blob(data, sizes, {strides.data(), size.size()}, like.device(), dtype,
                                  [kept = std::move(memory)](void* /*data*/) {});
}

}  // namespace pydense
