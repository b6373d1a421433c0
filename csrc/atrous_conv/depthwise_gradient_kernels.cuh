// SPDX-License-Identifier: Apache-2.0
// The gradient of a depthwise convolution's weight on a GPU. Blocks sum slabs of all columns, whose
// size depends on the shape alone: threads in the order of their columns, then over threads in one
// order. The slabs' sums are added in their order. Kernels of 3 x 3 go down columns; of others a
// block sums one tap.
#pragma once

#include "atrous_conv/depthwise_column.cuh"

namespace pydense {

template <class T>
struct DepthwiseGradientParams {
  DepthwiseGeometry<T> g;
  const T* grad;
  int64_t grad_batch;
  int64_t grad_channel;
  int64_t grad_row;
  uint64_t columns;  // of all images
  uint64_t slab;     // columns of a block
  uint32_t slabs;
  uint32_t channel_tiles;  // channels, or tiles of them for channels_last
  Accumulate<T>* sums;     // [slabs, channels, taps]
};

// Adds a column's products to the sums of all taps.
template <class T, int kVector>
__device__ __forceinline__ void add_column(const DepthwiseGradientParams<T>& p,
                                           const DepthwiseColumn& column, int64_t unit, const T* x,
                                           const T* grad,
                                           Vector<Accumulate<T>, kVector> (&sum)[kDepthwiseTaps]) {
  using A = Accumulate<T>;
  constexpr int kK = kDepthwiseKernel;
  const DepthwiseGeometry<T>& g = p.g;
  const SourceColumns<kK> from(g, column.x, unit);
  // Of the outputs of which a row of x is the tap in row 0, 1 and 2 of the kernel.
  Vector<A, kVector> of_output[kK];
  int64_t row = column.first - g.top;
  const T* next = grad + column.first * p.grad_row + column.x * unit;
  for (int q = 0; q < column.count + kK - 1; ++q) {
#pragma unroll
    for (int i = kK - 1; i > 0; --i) {
      of_output[i] = of_output[i - 1];
    }
    if (q < column.count) {
      of_output[0] = load_numbers<kVector>(next);
      next += g.dilation_y * p.grad_row;
    }
    if (row >= 0 && row < g.height) {
      Vector<A, kVector> own[kK];
#pragma unroll
      for (int j = 0; j < kK; ++j) {
        if (from.inside[j]) {
          own[j] = load_numbers<kVector>(x + row * g.x_row + from.at[j]);
        }
      }
#pragma unroll
      for (int i = 0; i < kK; ++i) {
        if (q >= i && q - i < column.count) {
#pragma unroll
          for (int j = 0; j < kK; ++j) {
            if (from.inside[j]) {
              add_product(of_output[i], own[j], sum[i * kK + j]);
            }
          }
        }
      }
    }
    row += g.dilation_y;
  }
}

// The product of one output and tap.
template <class T, int kVector>
__device__ __forceinline__ void add_output(const DepthwiseGradientParams<T>& p,
                                           const DepthwiseColumn& column, int64_t unit, int64_t tap,
                                           const T* x, const T* grad,
                                           Vector<Accumulate<T>, kVector>& sum) {
  const DepthwiseGeometry<T>& g = p.g;
  const int64_t i = tap / g.kernel_width;
  const int64_t j = tap - i * g.kernel_width;
  const int64_t row = column.first + i * g.dilation_y - g.top;
  const int64_t from = column.x + j * g.dilation_x - g.left;
  if (row >= 0 && row < g.height && from >= 0 && from < g.width) {
    add_product(load_numbers<kVector>(grad + column.first * p.grad_row + column.x * unit),
                load_numbers<kVector>(x + row * g.x_row + from * unit), sum);
  }
}

// A block: a slab of one channel, or of 32 vectors of channels; and one tap where it does not go
// down columns. blockIdx.x is (tap, slab, channels).
template <class T, int kVector, bool kChannelsLast, bool kColumns>
__global__ __launch_bounds__(kDepthwiseThreads) void depthwise_gradient_kernel(
    const __grid_constant__ DepthwiseGradientParams<T> p) {
  using A = Accumulate<T>;
  constexpr int kSums = kColumns ? kDepthwiseTaps : 1;
  constexpr int kLanes = kChannelsLast ? kDepthwiseLanes : 1;
  const int rows = static_cast<int>(blockDim.x) / kLanes;  // columns at work, a power of 2
  constexpr int kNumbers = kChannelsLast ? kDepthwiseLanes * kVector : 1;  // channels
  __shared__ __align__(16) A shared[kDepthwiseThreads / 32 * kSums * kNumbers];
  const DepthwiseGeometry<T>& g = p.g;
  const uint32_t tile = blockIdx.x % p.channel_tiles;
  const uint32_t rest = blockIdx.x / p.channel_tiles;
  const uint32_t slab = rest % p.slabs;
  const int64_t tap = rest / p.slabs;
  const auto lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto row = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t c = (int64_t{tile} * kLanes + lane) * kVector;
  const int64_t unit = kChannelsLast ? g.channels : 1;
  Vector<A, kVector> sum[kSums]{};
  const uint64_t begin = slab * p.slab;
  const uint64_t end = min(begin + p.slab, p.columns);
  for (uint64_t at = begin + static_cast<uint64_t>(row); at < end && c < g.channels;
       at += static_cast<uint64_t>(rows)) {
    const auto n = static_cast<int64_t>(
        p.columns <= UINT32_MAX ? static_cast<uint32_t>(at) / g.positions : at / g.positions);
    const DepthwiseColumn column =
        column_at(g, static_cast<uint32_t>(at - static_cast<uint64_t>(n) * g.positions));
    const T* const x = g.x + n * g.x_batch + c * g.x_channel;
    const T* const grad = p.grad + n * p.grad_batch + c * p.grad_channel;
    if constexpr (kColumns) {
      add_column<T, kVector>(p, column, unit, x, grad, sum);
    } else {
      add_output<T, kVector>(p, column, unit, tap, x, grad, sum[0]);
    }
  }
  // Over the lanes of a warp where they are columns, then over the warps, in one order.
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    if constexpr (!kChannelsLast) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        sum[k][0] += __shfl_xor_sync(0xFFFFFFFFU, sum[k][0], step);
      }
    }
    if (kChannelsLast || threadIdx.x % 32 == 0) {
      store_vector(shared + (warp * kSums + k) * kNumbers + (kChannelsLast ? lane * kVector : 0),
                   sum[k]);
    }
  }
  __syncthreads();
  const int64_t taps = g.kernel_height * g.kernel_width;
  const int64_t first = int64_t{tile} * kNumbers;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (auto i = static_cast<int>(threadIdx.x); i < kSums * kNumbers;
       i += static_cast<int>(blockDim.x)) {
    const int k = i / kNumbers;
    const int64_t channel = first + i - k * kNumbers;
    if (channel < g.channels) {
      A total = shared[i];
      for (int w = 1; w < warps; ++w) {
        total += shared[w * kSums * kNumbers + i];
      }
      p.sums[(slab * g.channels + channel) * taps + (kColumns ? k : tap)] = total;
    }
  }
}

template <class T>
struct DepthwiseSumParams {
  const Accumulate<T>* sums;  // [slabs, numbers]
  T* weight;                  // [numbers]
  int64_t numbers;
  uint32_t slabs;
};

template <class T>
__global__ __launch_bounds__(kDepthwiseThreads) void depthwise_gradient_sum_kernel(
    const __grid_constant__ DepthwiseSumParams<T> p) {
  const int64_t i = int64_t{blockIdx.x} * kDepthwiseThreads + threadIdx.x;
  if (i < p.numbers) {
    Accumulate<T> sum{};
    for (uint32_t slab = 0; slab < p.slabs; ++slab) {
      sum += p.sums[slab * p.numbers + i];
    }
    p.weight[i] = from_accumulate<T>(sum);
  }
}

}  // namespace pydense
