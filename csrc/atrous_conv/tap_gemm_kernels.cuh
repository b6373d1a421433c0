// SPDX-License-Identifier: Apache-2.0
// Shifting and adding maps of taps, and gathering shifted gradients. Lanes go along what lies side
// by side in the maps: the pixels of a line, or the lines of a pixel.
#pragma once

#include "atrous_conv/tap_gemm.h"
#include "common/cuda.cuh"

namespace pydense {

constexpr int kTapThreads = 256;  // of a block, at most
constexpr int kGatherPixels = 4;  // of a thread

// By number of the tap. Pixels of a picture are less than 2^31.
struct TapTable {
  int32_t taps;
  int32_t rows[kMaxTaps];
  int32_t columns[kMaxTaps];
  int32_t shifts[kMaxTaps];  // rows * width + columns
};

template <class T>
struct TapAddParams {
  const T* maps;
  int64_t pitch;
  int64_t image_step;  // of the maps, elements
  int32_t outputs;
  int32_t height;
  int32_t width;
  uint32_t items;   // pixels of a plane, or numbers of an image for channels_last
  uint32_t chunks;  // blocks that share them
  int32_t num_biases;
  T* out;
  TapStrides strides;
  TapTable table;
  const T* biases[kMaxTapBranches];
};

__device__ __forceinline__ bool is_within(int32_t i, int32_t size) {
  return static_cast<uint32_t>(i) < static_cast<uint32_t>(size);
}

// A thread makes one number of the output.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kTapThreads) void tap_add_kernel(
    const __grid_constant__ TapAddParams<T> p) {
  using A = Accumulate<T>;
  const uint32_t group = blockIdx.x / p.chunks;  // a plane, or an image
  const uint32_t item = (blockIdx.x - group * p.chunks) * blockDim.x + threadIdx.x;
  if (item >= p.items) {
    return;
  }
  const auto outputs = static_cast<uint32_t>(p.outputs);
  const uint32_t image = kChannelsLast ? group : group / outputs;
  const uint32_t pixel = kChannelsLast ? item / outputs : item;
  const auto o = static_cast<int32_t>(kChannelsLast ? item - pixel * outputs : group % outputs);
  const auto y = static_cast<int32_t>(pixel / static_cast<uint32_t>(p.width));
  const auto x = static_cast<int32_t>(pixel) - y * p.width;
  A sum{};
  for (int b = 0; b < p.num_biases; ++b) {
    sum += to_accumulate(p.biases[b][o]);
  }
  // Of the output's own pixel; a tap further for each tap.
  const T* line =
      p.maps + image * p.image_step + (kChannelsLast ? pixel * p.pitch + o : o * p.pitch + pixel);
  const int64_t tap_step = p.outputs * (kChannelsLast ? int64_t{1} : p.pitch);
  const int64_t pixel_step = kChannelsLast ? p.pitch : int64_t{1};
#pragma unroll 4
  for (int t = 0; t < p.table.taps; ++t) {
    if (is_within(y + p.table.rows[t], p.height) && is_within(x + p.table.columns[t], p.width)) {
      sum += to_accumulate(line[p.table.shifts[t] * pixel_step]);
    }
    line += tap_step;
  }
  p.out[image * p.strides.image + o * p.strides.channel + y * p.strides.row + x * p.strides.pixel] =
      from_accumulate<T>(sum);
}

template <class T>
struct TapGatherParams {
  const T* grad;
  TapStrides strides;
  T* maps;
  int64_t pitch;
  int32_t outputs;
  int32_t height;
  int32_t width;
  int32_t first;
  int32_t count;
  uint32_t lines;   // of a pixel: taps * outputs
  uint32_t chunks;  // blocks that share a line, or a group of pixels for channels_last
  uint32_t groups;  // of pixels, for channels_last
  TapTable table;
};

// A thread makes kGatherPixels numbers: of a line, a block apart, or pixels that follow each other.
template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kTapThreads) void tap_gather_kernel(
    const __grid_constant__ TapGatherParams<T> p) {
  const uint32_t block = blockIdx.x / p.chunks;
  const uint32_t chunk = blockIdx.x - block * p.chunks;
  const uint32_t image = block / (kChannelsLast ? p.groups : p.lines);
  const uint32_t rest = block - image * (kChannelsLast ? p.groups : p.lines);
  const uint32_t line = kChannelsLast ? chunk * blockDim.x + threadIdx.x : rest;
  if (kChannelsLast && line >= p.lines) {
    return;
  }
  const uint32_t tap = line / static_cast<uint32_t>(p.outputs);
  const auto o = static_cast<int32_t>(line - tap * static_cast<uint32_t>(p.outputs));
  const int32_t row = p.table.rows[tap];
  const int32_t column = p.table.columns[tap];
  const T* const grad = p.grad + image * p.strides.image + o * p.strides.channel;
  const uint32_t begin =
      kChannelsLast ? rest * kGatherPixels : chunk * blockDim.x * kGatherPixels + threadIdx.x;
  T* const to = kChannelsLast ? p.maps + int64_t{image} * p.count * p.pitch + line
                              : p.maps + (int64_t{image} * p.lines + line) * p.pitch;
  T found[kGatherPixels];
#pragma unroll
  for (int k = 0; k < kGatherPixels; ++k) {
    const auto i = static_cast<int32_t>(begin + k * (kChannelsLast ? 1 : blockDim.x));
    const int32_t pixel = p.first + i;
    const int32_t y = pixel / p.width;
    const int32_t from_y = y - row;
    const int32_t from_x = pixel - y * p.width - column;
    found[k] = from_accumulate<T>(Accumulate<T>{});
    if (i < p.count && is_within(from_y, p.height) && is_within(from_x, p.width)) {
      found[k] = grad[from_y * p.strides.row + from_x * p.strides.pixel];
    }
  }
#pragma unroll
  for (int k = 0; k < kGatherPixels; ++k) {
    const auto i = static_cast<int32_t>(begin + k * (kChannelsLast ? 1 : blockDim.x));
    if (i < p.count) {
      to[i * (kChannelsLast ? p.pitch : int64_t{1})] = found[k];
    }
  }
}

}  // namespace pydense
