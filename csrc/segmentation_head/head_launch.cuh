// SPDX-License-Identifier: Apache-2.0
// What the launchers of this room share.
#pragma once

#include <algorithm>
#include <limits>

#include "common/launch.cuh"
#include "segmentation_head/head_tile.cuh"

namespace pydense {

// Calls fn(S{}) with the type in memory of what is computed with in T.
template <class T, class Fn>
void with_stored(FloatType type, const Fn& fn) {
  if constexpr (sizeof(T) == sizeof(double)) {
    fn(double{});
  } else if (type == FloatType::kBFloat16) {
    fn(__nv_bfloat16{});
  } else if (type == FloatType::kFloat16) {
    fn(__half{});
  } else {
    fn(float{});
  }
}

template <class T>
void check_head(const char* op, const LogitsView& logits, const HeadAxes<T>& axes) {
  PYDENSE_CHECK(logits.classes >= 1 && logits.classes <= std::numeric_limits<int32_t>::max(), op,
                ": logits must have 1 to 2^31 - 1 classes, got ", logits.classes);
  PYDENSE_CHECK(logits.height == axes.y.in_size && logits.width == axes.x.in_size, op,
                ": logits must have the size of the axes, got ", logits.height, " x ",
                logits.width);
  PYDENSE_CHECK((logits.type == FloatType::kFloat64) == (sizeof(T) == sizeof(double)), op,
                ": logits must be float64 for arithmetic in double, and only then");
}

// A block for each of `blocks`, or a grid whose blocks take several one after another.
inline LaunchConfig head_config(int64_t blocks, int device, void* stream) {
  constexpr int64_t kMostBlocks = int64_t{1} << 20;
  return {dim3(static_cast<unsigned>(std::min(blocks, kMostBlocks))), dim3(kHeadColumns), 0, device,
          stream};
}

}  // namespace pydense
