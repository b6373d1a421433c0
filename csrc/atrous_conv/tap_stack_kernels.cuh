// SPDX-License-Identifier: Apache-2.0
// From the weights of branches, in which the 9 taps lie side by side, to one matrix with a row for
// each tap and output, and back. A block turns the channels of one output, in shared memory.
#pragma once

#include "atrous_conv/tap_gemm.h"
#include "common/cuda.cuh"

namespace pydense {

constexpr int kStackThreads = 256;

template <class T>
struct TapStackParams {
  int64_t first;
  int64_t count;
  int64_t channels;
  T* stack;
  int32_t taps;
  int32_t branches;
  int32_t chunk_bits;                              // a block has 2^chunk_bits channels
  uint32_t chunks;                                 // blocks that share an output
  int16_t starts[kMaxTaps + 1];                    // of a tap's members
  int16_t members[kMaxTapBranches * kBranchTaps];  // branch * 9 + tap
  const T* weights[kMaxTapBranches];
};

template <class T>
__global__ __launch_bounds__(kStackThreads) void tap_stack_kernel(
    const __grid_constant__ TapStackParams<T> p) {
  using A = Accumulate<T>;
  PYDENSE_DYNAMIC_SHARED(A, tile);  // [branches, channels, 9]
  const int64_t output = blockIdx.x / p.chunks;
  const int chunk = 1 << p.chunk_bits;
  const int64_t channel = int64_t{blockIdx.x % p.chunks} << p.chunk_bits;
  const auto channels = static_cast<int>(min(p.channels - channel, int64_t{chunk}));
  const int64_t place = ((p.first + output) * p.channels + channel) * kBranchTaps;
  for (int b = 0; b < p.branches; ++b) {
    const T* const from = p.weights[b] + place;
    A* const to = tile + b * chunk * kBranchTaps;
    for (auto i = static_cast<int>(threadIdx.x); i < channels * kBranchTaps; i += kStackThreads) {
      to[i] = to_accumulate(from[i]);
    }
  }
  __syncthreads();
  for (auto i = static_cast<int>(threadIdx.x); i < p.taps << p.chunk_bits; i += kStackThreads) {
    const int tap = i >> p.chunk_bits;
    const int c = i & (chunk - 1);
    if (c < channels) {
      A sum{};
      for (int k = p.starts[tap]; k < p.starts[tap + 1]; ++k) {
        const int branch = p.members[k] / kBranchTaps;
        const int own = p.members[k] - branch * kBranchTaps;
        sum += tile[(branch * chunk + c) * kBranchTaps + own];
      }
      p.stack[(tap * p.count + output) * p.channels + channel + c] = from_accumulate<T>(sum);
    }
  }
}

constexpr int kUnstackChannels = 128;

template <class T, class S>
struct TapUnstackParams {
  const S* stack;
  T* weight;
  int64_t outputs;
  int64_t channels;
  uint32_t chunks;
  int32_t places[kBranchTaps];
};

// S is T, or float for 16-bit weights.
template <class T, class S>
__global__ __launch_bounds__(kStackThreads) void tap_unstack_kernel(
    const __grid_constant__ TapUnstackParams<T, S> p) {
  using A = Accumulate<T>;
  __shared__ A tile[kUnstackChannels * kBranchTaps];
  const int64_t output = blockIdx.x / p.chunks;
  const int64_t channel = int64_t{blockIdx.x % p.chunks} * kUnstackChannels;
  const auto channels = static_cast<int>(min(p.channels - channel, int64_t{kUnstackChannels}));
  for (auto i = static_cast<int>(threadIdx.x); i < kBranchTaps * kUnstackChannels;
       i += kStackThreads) {
    const int own = i / kUnstackChannels;
    const int c = i % kUnstackChannels;
    if (c < channels) {
      A value{};
      if (p.places[own] >= 0) {
        value =
            to_accumulate(p.stack[(p.places[own] * p.outputs + output) * p.channels + channel + c]);
      }
      tile[c * kBranchTaps + own] = value;
    }
  }
  __syncthreads();
  T* const to = p.weight + (output * p.channels + channel) * kBranchTaps;
  for (auto i = static_cast<int>(threadIdx.x); i < channels * kBranchTaps; i += kStackThreads) {
    to[i] = from_accumulate<T>(tile[i]);
  }
}

}  // namespace pydense
