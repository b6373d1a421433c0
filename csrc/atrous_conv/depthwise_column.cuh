// SPDX-License-Identifier: Apache-2.0
// Depthwise atrous convolution on a GPU: what its kernels share. A thread goes down a column of
// outputs that are a rate apart (a tile of phase_tiles.h): each row of x that it reads is a tap of
// several of them, whose sums are at work at the same time. Lanes are columns or, for
// channels_last, vectors of channels.
#pragma once

#include "atrous_conv/depthwise.h"
#include "atrous_conv/phase_tiles.h"
#include "common/cuda.cuh"

namespace pydense {

constexpr int kDepthwiseThreads = 256;
constexpr int kDepthwiseKernel = 3;  // rows and columns of the kernel that runs down columns
constexpr int kDepthwiseTaps = kDepthwiseKernel * kDepthwiseKernel;
constexpr int kDepthwiseLanes = 32;  // vectors of channels of a block, for channels_last
constexpr int kDepthwiseRows = kDepthwiseThreads / kDepthwiseLanes;

// Channels of a thread, for channels_last and where memory allows it.
template <class T>
constexpr int kDepthwiseVector = sizeof(T) == 8 ? 2 : 4;

template <class T>
struct DepthwiseGeometry {
  int64_t channels;
  int64_t height;  // of x
  int64_t width;
  int64_t out_height;
  int64_t out_width;
  int64_t kernel_height;
  int64_t kernel_width;
  int64_t dilation_y;
  int64_t dilation_x;
  int64_t top;
  int64_t left;
  const T* x;
  int64_t x_batch;
  int64_t x_channel;
  int64_t x_row;
  int64_t band;        // outputs of a column at most
  uint32_t positions;  // columns of all phases of a picture
};

// A column of outputs: (first, x), (first + dilation_y, x), ...
struct DepthwiseColumn {
  int64_t x;
  int64_t first;
  int32_t count;
};

template <class T>
__device__ __forceinline__ DepthwiseColumn column_at(const DepthwiseGeometry<T>& g,
                                                     uint32_t position) {
  const auto width = static_cast<uint32_t>(g.out_width);
  const auto rate = static_cast<uint32_t>(g.dilation_y);
  const auto band = static_cast<uint32_t>(g.band);
  const uint32_t u = position / width;
  const uint32_t first = phase_tile_at(u, rate, band);
  const uint32_t left = (static_cast<uint32_t>(g.out_height) - first - 1) / rate + 1;
  return {position - u * width, first, static_cast<int32_t>(min(left, band))};
}

// The columns of x that a column of outputs meets, as elements of a row.
template <int kColumns>
struct SourceColumns {
  int64_t at[kColumns];
  bool inside[kColumns];

  template <class T>
  __device__ __forceinline__ SourceColumns(const DepthwiseGeometry<T>& g, int64_t x, int64_t unit) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t column = x + j * g.dilation_x - g.left;
      inside[j] = column >= 0 && column < g.width;
      at[j] = column * unit;
    }
  }
};

template <int kVector, class T>
__device__ __forceinline__ Vector<Accumulate<T>, kVector> load_numbers(const T* from) {
  const auto raw = load_vector<kVector>(from);
  Vector<Accumulate<T>, kVector> numbers;
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    numbers[c] = to_accumulate(raw[c]);
  }
  return numbers;
}

template <class A, int kVector>
__device__ __forceinline__ void add_product(const Vector<A, kVector>& a,
                                            const Vector<A, kVector>& b, Vector<A, kVector>& sum) {
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    sum[c] = fma(a[c], b[c], sum[c]);
  }
}

}  // namespace pydense
