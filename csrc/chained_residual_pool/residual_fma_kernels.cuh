// SPDX-License-Identifier: Apache-2.0
// A stage in float and double: every sum is one chain of fused multiply-adds along the depth, as
// the CPU's, with the same bits. A thread has kMicro x kMicro sums, in groups of kGroup neighbours.
// And the sum of residuals alone.
#pragma once

#include "chained_residual_pool/pooled_operand.cuh"
#include "upsample/upsample_math.h"

namespace pydense {

constexpr int kFmaThreads = 512;  // at most
constexpr int kFmaMinThreads = 128;
constexpr int kFmaSide = 16;  // threads along the pixels of a tile
constexpr int kFmaDepth = 8;  // of a step

// Sums of a thread along each side: what registers hold.
template <class T>
constexpr int kFmaMicro = 32 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kFmaRows = kFmaMicro<T>;  // of pixels in a block: kFmaSide is a row
template <class T>
constexpr int kFmaChannels = kFmaThreads / kFmaSide * kFmaMicro<T>;  // of a block, at most

template <class T, bool kChannelsLast, int kSize>
class ResidualFma {
  static constexpr int kGroup = kResidualVector<T>;
  static constexpr int kMicro = kFmaMicro<T>;
  static constexpr int kPixels = kFmaSide * kMicro;
  // Two strips of a warp lie in different banks.
  static constexpr int kPixelPitch = kPixels + (kChannelsLast ? kGroup : 8);
  static constexpr int kChannelPitch = kFmaChannels<T> + kGroup;
  static_assert(kFmaSide == kResidualColumns);
  static_assert(kFmaThreads / kFmaSide * kMicro * kFmaDepth == kFmaThreads * kGroup);
  using Group = Vector<T, kGroup>;
  using Pixels = PooledOperand<T, kChannelsLast, kSize, kSize != 1, kFmaDepth, kFmaRows<T>>;

 public:
  struct alignas(16) Shared {
    T around[2][Pixels::kElements];            // the tile, with what windows reach
    T pixels[2][kFmaDepth * kPixelPitch];      // [depth, pixels]
    T channels[2][kFmaDepth * kChannelPitch];  // the weight: [depth, channels of the result]
  };

  __device__ __forceinline__ ResidualFma(const ResidualStageParams<T>& p, Shared& shared)
      : p_(p), shared_(shared), tile_(p, kFmaRows<T>), pixels_(p, tile_) {}

  __device__ __forceinline__ void run() {
    const int steps = (p_.depth + kFmaDepth - 1) / kFmaDepth;
    bring_pixels(0);
    fetch_weight(0);
    put_weight(0);
    copy_async_wait<0>();
    __syncthreads();
    bring_pixels(1);
    pool(0);
    for (int s = 0; s < steps; ++s) {
      copy_async_wait<0>();
      __syncthreads();
      const bool more = s + 1 < steps;
      if (more) {
        bring_pixels(s + 2);
        pool(s + 1);
        fetch_weight(s + 1);
      }
      multiply(s % 2);
      if (more) {
        put_weight(s + 1);
      }
    }
    write();
  }

 private:
  __device__ __forceinline__ static int thread() { return opaque(static_cast<int>(threadIdx.x)); }
  // Threads along the channels.
  __device__ __forceinline__ static int side() { return static_cast<int>(blockDim.x) / kFmaSide; }
  // Of number i of a thread's: groups lie a row of threads apart.
  __device__ __forceinline__ static int pixel(int i) {
    const int own = kChannelsLast ? thread() / side() : thread() % kFmaSide;
    return (own + i / kGroup * kFmaSide) * kGroup + i % kGroup;
  }
  __device__ __forceinline__ static int channel(int i) {
    const int own = kChannelsLast ? thread() % side() : thread() / kFmaSide;
    return (own + i / kGroup * side()) * kGroup + i % kGroup;
  }

  __device__ __forceinline__ void bring_pixels(int s) const {
    if (s * kFmaDepth < p_.depth) {
      pixels_.bring(s * kFmaDepth, shared_.around[s % 2]);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void pool(int s) const {
    T* const to = shared_.pixels[s % 2];
    pixels_.pool(s * kFmaDepth, shared_.around[s % 2],
                 [to](int channel, int pixel, const typename Pixels::Pooled& pooled) {
                   store_vector(to + channel * kPixelPitch + pixel, pooled);
                 });
  }

  // A thread moves a group of one channel of the result, and turns it on the way.
  __device__ __forceinline__ int weight_channel() const { return thread() / (kFmaDepth / kGroup); }
  __device__ __forceinline__ int weight_k() const {
    return thread() % (kFmaDepth / kGroup) * kGroup;
  }

  __device__ __forceinline__ void fetch_weight(int s) {
    const int k = s * kFmaDepth + weight_k();
    const T* const from = p_.weight + int64_t{tile_.channel + weight_channel()} * p_.depth + k;
    const int inside = weight_channel() < p_.depth - tile_.channel ? p_.depth - k : 0;
    if (p_.weight_vectors && inside > 0) {
      weight_ = load_vector<kGroup>(from);
      return;
    }
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      weight_[e] = e < inside ? from[e] : T{};
    }
  }

  __device__ __forceinline__ void put_weight(int s) const {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      shared_.channels[s % 2][(weight_k() + e) * kChannelPitch + weight_channel()] = weight_[e];
    }
  }

  __device__ __forceinline__ void multiply(int stage) {
#pragma unroll 2
    for (int k = 0; k < kFmaDepth; ++k) {
      T pixels[kMicro];
      T channels[kMicro];
#pragma unroll
      for (int i = 0; i < kMicro; i += kGroup) {
        const auto a = load_vector<kGroup>(shared_.pixels[stage] + k * kPixelPitch + pixel(i));
        const auto b =
            load_vector<kGroup>(shared_.channels[stage] + k * kChannelPitch + channel(i));
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          pixels[i + e] = a[e];
          channels[i + e] = b[e];
        }
      }
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) {
          sums_[i][j] = portable::exact_fma(channels[i], pixels[j], sums_[i][j]);
        }
      }
    }
  }

  // Registers have no index that is not known to the compiler, and this loop is too long for eight
  // copies: so sums move up after every turn.
  __device__ __forceinline__ void write() {
#pragma unroll 1
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; j += kGroup) {
        T sum[kGroup];
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          sum[e] = kChannelsLast ? sums_[j + e][0] : sums_[0][j + e];
        }
        finish_residual<T, kChannelsLast>(p_, tile_, pixel(kChannelsLast ? i : j),
                                          tile_.channel + channel(kChannelsLast ? j : i), sum);
      }
#pragma unroll
      for (int from = 1; from < kMicro; ++from) {
#pragma unroll
        for (int k = 0; k < kMicro; ++k) {
          if constexpr (kChannelsLast) {
            sums_[k][from - 1] = sums_[k][from];
          } else {
            sums_[from - 1][k] = sums_[from][k];
          }
        }
      }
    }
  }

  const ResidualStageParams<T>& p_;
  Shared& shared_;
  ResidualTile<kChannelsLast> tile_;
  Pixels pixels_;
  Group weight_;  // of the next step
  T sums_[kMicro][kMicro] = {};
};

template <class T, bool kChannelsLast, int kSize>
__global__ __launch_bounds__(kFmaThreads, 1) void residual_fma_kernel(
    const __grid_constant__ ResidualStageParams<T> p) {
  __shared__ typename ResidualFma<T, kChannelsLast, kSize>::Shared shared;
  ResidualFma<T, kChannelsLast, kSize>(p, shared).run();
}

template <class T>
struct ResidualSumParams {
  int64_t vectors;
  int32_t num_addends;
  const T* addends[kMaxResidualStages + 1];
  T* out;
};

constexpr int kSumThreads = 256;

// From the first addend to the last.
template <class T, int kVector>
__global__ __launch_bounds__(kSumThreads) void residual_sum_kernel(
    const __grid_constant__ ResidualSumParams<T> p) {
  for (int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; i < p.vectors;
       i += int64_t{gridDim.x} * kSumThreads) {
    Accumulate<T> sum[kVector] = {};
    for (int k = 0; k < p.num_addends; ++k) {
      const auto addend = load_vector<kVector>(p.addends[k] + i * kVector);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        sum[e] = k == 0 ? to_accumulate(addend[e]) : sum[e] + to_accumulate(addend[e]);
      }
    }
    Vector<T, kVector> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      result[e] = from_accumulate<T>(sum[e]);
    }
    store_global_vector(p.out + i * kVector, result);
  }
}

}  // namespace pydense
