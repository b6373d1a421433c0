// SPDX-License-Identifier: Apache-2.0
// Depthwise atrous convolution on a GPU. Kernels of 3 x 3 go down columns, others make one output
// at a time. Sums go from the bias and the first tap to the last, as on the CPU.
#pragma once

#include "atrous_conv/depthwise_column.cuh"

namespace pydense {

template <class T>
struct DepthwiseParams {
  DepthwiseGeometry<T> g;
  const T* weight;
  const T* bias;
  T* out;
  bool flipped;
  bool relu;
  uint32_t chunks;         // blocks that share a plane, or an image for channels_last
  uint32_t channel_tiles;  // for channels_last
  int32_t rounds;          // of columns that a block makes, for channels_last
};

template <class T, int kVector>
__device__ __forceinline__ void store_outputs(const DepthwiseParams<T>& p, T* to,
                                              const Vector<Accumulate<T>, kVector>& sum) {
  using A = Accumulate<T>;
  Vector<T, kVector> result;
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    result[c] = from_accumulate<T>(p.relu && sum[c] < A{} ? A{} : sum[c]);  // NaN stays
  }
  store_global_vector(to, result);
}

// weight(k) are the numbers of tap k; x and out begin at the thread's channels.
template <class T, int kVector, class Weight>
__device__ __forceinline__ void convolve_column(const DepthwiseParams<T>& p,
                                                const DepthwiseColumn& column, int64_t unit,
                                                const T* x,
                                                const Vector<Accumulate<T>, kVector>& bias,
                                                const Weight& weight, T* out) {
  using A = Accumulate<T>;
  constexpr int kK = kDepthwiseKernel;
  const DepthwiseGeometry<T>& g = p.g;
  const SourceColumns<kK> from(g, column.x, unit);
  // Of the outputs of which a row of x is the tap in row 0, 1 and 2 of the kernel.
  Vector<A, kVector> sum[kK];
  int64_t row = column.first - g.top;
  int64_t to = (column.first - (kK - 1) * g.dilation_y) * g.out_width + column.x;
  for (int q = 0; q < column.count + kK - 1; ++q) {
#pragma unroll
    for (int i = kK - 1; i > 0; --i) {
      sum[i] = sum[i - 1];
    }
    sum[0] = bias;
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
#pragma unroll
        for (int j = 0; j < kK; ++j) {
          if (from.inside[j]) {
            add_product(weight(i * kK + j), own[j], sum[i]);
          }
        }
      }
    }
    if (q >= kK - 1) {
      store_outputs<T, kVector>(p, out + to * unit, sum[kK - 1]);
    }
    row += g.dilation_y;
    to += g.dilation_y * g.out_width;
  }
}

template <class T, int kVector, class Weight>
__device__ __forceinline__ void convolve_output(const DepthwiseParams<T>& p, int64_t y,
                                                int64_t column, int64_t unit, const T* x,
                                                Vector<Accumulate<T>, kVector> sum,
                                                const Weight& weight, T* out) {
  const DepthwiseGeometry<T>& g = p.g;
  for (int64_t i = 0; i < g.kernel_height; ++i) {
    const int64_t row = y + i * g.dilation_y - g.top;
    if (row < 0 || row >= g.height) {
      continue;
    }
    for (int64_t j = 0; j < g.kernel_width; ++j) {
      const int64_t from = column + j * g.dilation_x - g.left;
      if (from >= 0 && from < g.width) {
        add_product(weight(i * g.kernel_width + j),
                    load_numbers<kVector>(x + row * g.x_row + from * unit), sum);
      }
    }
  }
  store_outputs<T, kVector>(p, out + (y * g.out_width + column) * unit, sum);
}

template <class T, bool kColumns>
__global__ __launch_bounds__(kDepthwiseThreads) void depthwise_kernel(
    const __grid_constant__ DepthwiseParams<T> p) {
  using A = Accumulate<T>;
  const DepthwiseGeometry<T>& g = p.g;
  const uint32_t plane = blockIdx.x / p.chunks;
  const uint32_t position = (blockIdx.x % p.chunks) * blockDim.x + threadIdx.x;
  if (position >= g.positions) {
    return;
  }
  const int64_t n = plane / static_cast<uint32_t>(g.channels);
  const int64_t c = plane - n * g.channels;
  const T* const x = g.x + n * g.x_batch + c * g.x_channel;
  T* const out = p.out + plane * g.out_height * g.out_width;
  const Vector<A, 1> bias = {{p.bias == nullptr ? A{} : to_accumulate(p.bias[c])}};
  const int64_t taps = g.kernel_height * g.kernel_width;
  const T* const own = p.weight + c * taps;
  const DepthwiseColumn column = column_at(g, position);
  if constexpr (kColumns) {
    Vector<A, 1> numbers[kDepthwiseTaps];
#pragma unroll
    for (int k = 0; k < kDepthwiseTaps; ++k) {
      numbers[k][0] = to_accumulate(own[p.flipped ? kDepthwiseTaps - 1 - k : k]);
    }
    convolve_column<T, 1>(p, column, 1, x, bias, [&](int k) { return numbers[k]; }, out);
  } else {
    const auto weight = [&](int64_t k) {
      return Vector<A, 1>{{to_accumulate(own[p.flipped ? taps - 1 - k : k])}};
    };
    convolve_output<T, 1>(p, column.first, column.x, 1, x, bias, weight, out);
  }
}

// A block has 32 vectors of channels, whose weights it keeps in shared memory.
template <class T, int kVector, bool kColumns>
__global__ __launch_bounds__(kDepthwiseThreads, kColumns ? 1 : 3) void depthwise_last_kernel(
    const __grid_constant__ DepthwiseParams<T> p) {
  using A = Accumulate<T>;
  constexpr int kChannels = kDepthwiseLanes * kVector;
  constexpr int kPitch = kChannels + 16 / sizeof(A);  // writers of neighbouring taps do not meet
  __shared__ __align__(16) A numbers[kColumns ? kDepthwiseTaps * kPitch : 1];
  const DepthwiseGeometry<T>& g = p.g;
  const int64_t first_channel = int64_t{blockIdx.x % p.channel_tiles} * kChannels;
  const uint32_t block = blockIdx.x / p.channel_tiles;
  const int64_t n = block / p.chunks;
  const auto lane = static_cast<int>(threadIdx.x % kDepthwiseLanes);
  const auto row = static_cast<int>(threadIdx.x / kDepthwiseLanes);
  const int64_t c = first_channel + lane * kVector;
  const int64_t taps = g.kernel_height * g.kernel_width;
  if constexpr (kColumns) {
    const auto count =
        static_cast<int>(min(g.channels - first_channel, int64_t{kChannels})) * kDepthwiseTaps;
    for (auto e = static_cast<int>(threadIdx.x); e < count; e += kDepthwiseThreads) {
      const int own = e / kDepthwiseTaps;
      const int k = e - own * kDepthwiseTaps;
      numbers[(p.flipped ? kDepthwiseTaps - 1 - k : k) * kPitch + own] =
          to_accumulate(p.weight[first_channel * kDepthwiseTaps + e]);
    }
    __syncthreads();
  }
  if (c >= g.channels) {
    return;
  }
  const T* const x = g.x + n * g.x_batch + c;
  T* const out = p.out + n * g.out_height * g.out_width * g.channels + c;
  Vector<A, kVector> bias{};
  if (p.bias != nullptr) {
    bias = load_numbers<kVector>(p.bias + c);
  }
  const uint32_t begin = (block % p.chunks) * static_cast<uint32_t>(p.rounds) * kDepthwiseRows;
  for (int r = 0; r < p.rounds; ++r) {
    const uint32_t position = begin + static_cast<uint32_t>(r * kDepthwiseRows + row);
    if (position >= g.positions) {
      break;
    }
    const DepthwiseColumn column = column_at(g, position);
    if constexpr (kColumns) {
      const auto weight = [&](int k) {
        return load_vector<kVector>(numbers + k * kPitch + lane * kVector);
      };
      convolve_column<T, kVector>(p, column, g.channels, x, bias, weight, out);
    } else {
      const auto weight = [&](int64_t k) {
        Vector<A, kVector> own;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          own[v] = to_accumulate(p.weight[(c + v) * taps + (p.flipped ? taps - 1 - k : k)]);
        }
        return own;
      };
      convolve_output<T, kVector>(p, column.first, column.x, g.channels, x, bias, weight, out);
    }
  }
}

}  // namespace pydense
