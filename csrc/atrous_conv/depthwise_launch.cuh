// SPDX-License-Identifier: Apache-2.0
// What the launchers of depthwise convolution share.
#pragma once

#include <algorithm>

#include "atrous_conv/depthwise_column.cuh"
#include "common/parallel.h"
#include "common/picture_launch.cuh"

namespace pydense {

// As many threads as keep the GPU busy. With fewer, columns are cut, which read the rows around
// them again.
constexpr int64_t kDepthwiseWantedThreads = kMultiprocessors * 2048;
constexpr int64_t kDepthwiseLeastBand = 8;

inline bool runs_down_columns(const DepthwiseShape& shape) {
  return shape.kernel_height == kDepthwiseKernel && shape.kernel_width == kDepthwiseKernel;
}

// `beside` threads make a column of all images and channels.
template <class T>
DepthwiseGeometry<T> depthwise_geometry(const char* op, const DepthwiseShape& shape,
                                        const DepthwiseSource& x, int64_t beside) {
  PYDENSE_CHECK(shape.out_height < (int64_t{1} << 31) / shape.out_width, op,
                ": out must have less than 2^31 pixels, got ", shape.out_height, " x ",
                shape.out_width);
  DepthwiseGeometry<T> g{};
  g.channels = shape.channels;
  g.height = shape.height;
  g.width = shape.width;
  g.out_height = shape.out_height;
  g.out_width = shape.out_width;
  g.kernel_height = shape.kernel_height;
  g.kernel_width = shape.kernel_width;
  g.dilation_y = shape.dilation_y;
  g.dilation_x = shape.dilation_x;
  g.top = shape.top;
  g.left = shape.left;
  g.x = static_cast<const T*>(x.data);
  g.x_batch = x.batch;
  g.x_channel = shape.channels_last ? 1 : x.channel;
  g.x_row = x.row;
  g.band = runs_down_columns(shape) ? ceil_div(shape.out_height, shape.dilation_y) : 1;
  const auto tiles = [&] { return phase_tiles(shape.out_height, shape.dilation_y, g.band); };
  while (g.band >= 2 * kDepthwiseLeastBand &&
         tiles() * shape.out_width * beside < kDepthwiseWantedThreads) {
    g.band = ceil_div(g.band, int64_t{2});
  }
  g.positions = static_cast<uint32_t>(tiles() * shape.out_width);
  return g;
}

// Whether the vectors of channels of a channels_last picture can be moved.
inline bool depthwise_is_aligned(const DepthwiseShape& shape, const DepthwiseSource& x,
                                 size_t element, int vector) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride % vector == 0; };
  return shape.channels % vector == 0 && fits(shape.batches, x.batch) && x.row % vector == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % (element * static_cast<size_t>(vector)) == 0;
}

inline bool depthwise_is_aligned(const void* data, size_t element, int vector) {
  return reinterpret_cast<uintptr_t>(data) % (element * static_cast<size_t>(vector)) == 0;
}

inline unsigned depthwise_grid(const char* op, int64_t a, int64_t b) {
  PYDENSE_CHECK(a <= INT32_MAX / b, op, ": x must have less than 2^31 tiles, got ", a, " x ", b);
  return static_cast<unsigned>(a * b);
}

}  // namespace pydense
