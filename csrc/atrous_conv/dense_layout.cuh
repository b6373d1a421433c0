// SPDX-License-Identifier: Apache-2.0
// Which operands of dense convolutions are read where they are, and launches that lay out the
// others.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "atrous_conv/dense_layout_kernels.cuh"
#include "common/float_type.h"
#include "common/launch.cuh"
#include "common/parallel.h"

namespace pydense {

// Calls fn(T{}) with T the type in memory.
template <class Fn>
auto with_tensor_core_type(const char* op, FloatType dtype, const Fn& fn) {
  PYDENSE_CHECK(dtype != FloatType::kFloat64, op,
                ": x must be of dtype Float (computed in TF32), BFloat16 or Half on CUDA, got "
                "Double");
  return dtype == FloatType::kFloat32    ? fn(float{})
         : dtype == FloatType::kBFloat16 ? fn(__nv_bfloat16{})
                                         : fn(__half{});
}

template <class T>
int64_t dense_vector_channels(int64_t channels) {
  return ceil_div(channels, int64_t{kDenseVector<T>}) * kDenseVector<T>;
}

// Whether all pixels begin at multiples of 16 bytes; strides of axes of one element do not count.
template <class T>
bool dense_are_vectors(const void* data, int64_t batch, int64_t row, int64_t pixel, int64_t batches,
                       int64_t height, int64_t width) {
  const auto fits = [](int64_t stride, int64_t size) {
    return size <= 1 || stride % kDenseVector<T> == 0;
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(batch, batches) && fits(row, height) &&
         fits(pixel, width);
}

template <class T>
bool dense_reads_in_place(const DenseConvPicture& x, const DenseConvShape& shape,
                          int64_t channels) {
  return x.channel == 1 && channels % kDenseVector<T> == 0 &&
         dense_are_vectors<T>(x.data, x.batch, x.row, x.pixel, shape.batches, shape.height,
                              shape.width);
}
template <class T>
bool dense_reads_in_place(const DenseConvWeight& weight, const DenseConvShape& shape) {
  return weight.channel == 1 && shape.channels % kDenseVector<T> == 0 &&
         dense_are_vectors<T>(weight.data, 0, weight.output, weight.tap, 1, shape.outputs,
                              shape.taps());
}

template <class T>
void lay_out_dense_pixels(const DenseConvPicture& x, int64_t batches, int64_t channels,
                          int64_t height, int64_t width, T* to, int device, void* stream) {
  DensePixelsParams<T> p = {};
  p.from = static_cast<const T*>(x.data);
  p.batch = x.batch;
  p.channel = x.channel;
  p.row = x.row;
  p.pixel = x.pixel;
  p.channels = static_cast<int32_t>(channels);
  p.width = static_cast<int32_t>(width);
  p.pixels = static_cast<uint32_t>(height * width);
  p.to_channels = static_cast<int32_t>(dense_vector_channels<T>(channels));
  p.to = to;
  p.pixel_tiles = static_cast<uint32_t>(ceil_div(height * width, int64_t{64}));
  p.channel_tiles = static_cast<uint32_t>(ceil_div(int64_t{p.to_channels}, int64_t{64}));
  const int64_t blocks = batches * p.pixel_tiles * p.channel_tiles;
  PYDENSE_CHECK(height * width < INT32_MAX && blocks <= INT32_MAX,
                "dense_atrous_conv2d: x must have less than 2^31 tiles, got ", blocks);
  PYDENSE_LAUNCH(
      dense_pixels_kernel<T>,
      (LaunchConfig{dim3(static_cast<unsigned>(blocks)), dim3(kLayoutThreads), 0, device, stream}),
      p);
}

// [taps, outputs, channels]
template <class T>
void lay_out_dense_weight(const DenseConvWeight& weight, const DenseConvShape& shape, T* to,
                          int device, void* stream) {
  DenseWeightParams<T> p = {};
  const int64_t last = weight.flipped ? shape.taps() - 1 : 0;
  p.from = static_cast<const T*>(weight.data) + last * weight.tap;
  p.output = weight.output;
  p.channel = weight.channel;
  p.tap = weight.flipped ? -weight.tap : weight.tap;
  p.outputs = static_cast<int32_t>(shape.outputs);
  p.channels = static_cast<int32_t>(shape.channels);
  p.taps = static_cast<int32_t>(shape.taps());
  p.to = to;
  p.to_channels = static_cast<int32_t>(dense_vector_channels<T>(shape.channels));
  p.outputs_first = weight.output < weight.channel;
  p.taps_first = weight.tap < std::min(weight.output, weight.channel);
  p.channel_tiles = static_cast<uint32_t>(ceil_div(int64_t{p.to_channels}, int64_t{32}));
  p.tap_tiles = static_cast<uint32_t>(ceil_div(shape.taps(), int64_t{kWeightTaps}));
  const int64_t blocks =
      int64_t{p.channel_tiles} * p.tap_tiles * ceil_div(shape.outputs, int64_t{32});
  PYDENSE_CHECK(blocks <= INT32_MAX,
                "dense_atrous_conv2d: weight must have less than 2^31 tiles, "
                "got ",
                blocks);
  PYDENSE_LAUNCH(
      dense_weight_kernel<T>,
      (LaunchConfig{dim3(static_cast<unsigned>(blocks)), dim3(kLayoutThreads), 0, device, stream}),
      p);
}

}  // namespace pydense
