// SPDX-License-Identifier: Apache-2.0
// A stage on tensor cores, for 16-bit types with sums in float: blocks of 128 pixels and up to 256
// channels, a warp 32 x 64 of it. While the channels of one step are multiplied, those of the next
// one are pooled, and those after that are on their way.
#pragma once

#include "chained_residual_pool/pooled_operand.cuh"

namespace pydense {

constexpr int kMmaRows = 8;  // of pixels in a block
constexpr int kMmaPixels = kMmaRows * kResidualColumns;
constexpr int kMmaDepth = 32;     // of a step
constexpr int kMmaThreads = 512;  // at most; two for each channel of the result
constexpr int kMmaChannels = kMmaThreads / 2;
constexpr int kMmaMinThreads = 128;
constexpr int kMmaWarpRows = 32;
constexpr int kMmaWarpColumns = 64;
constexpr int kMmaVector = 8;
// Sums on their way out: 16 rows of a warp.
constexpr int kMmaSumPitch = kMmaWarpColumns + kMmaVector;

// Operands in shared memory. Contiguous pictures: [32 channels, 128 pixels], with 16 bytes more in
// a row than it holds. The weight, and pixels of channels_last: [rows, 32 channels], where vectors
// change places. In both, eight rows of a matrix lie in all banks, and so do the words that a warp
// pools.
constexpr int kMmaWidePitch = kMmaPixels + kMmaVector;
__device__ __forceinline__ int mma_wide_place(int k, int column) {
  return k * kMmaWidePitch + column;
}
__device__ __forceinline__ int mma_deep_place(int row, int k) {
  return row * kMmaDepth + ((k / kMmaVector) ^ (row / 2 % 4)) * kMmaVector + k % kMmaVector;
}

template <class T, bool kChannelsLast, int kSize, bool kOffsets>
class ResidualMma {
  using Pixels = PooledOperand<T, kChannelsLast, kSize, kOffsets, kMmaDepth, kMmaRows>;
  static constexpr int kOperand =
      kChannelsLast ? kMmaPixels * kMmaDepth : kMmaDepth * kMmaWidePitch;

 public:
  // Of shared memory, for so many threads.
  __host__ __device__ static constexpr int bytes(int threads) {
    const int operands = 2 * (Pixels::kElements + kOperand + threads / 2 * kMmaDepth) * 2;
    const int sums = threads / 32 * 16 * kMmaSumPitch * 4;
    return operands > sums ? operands : sums;
  }

  __device__ __forceinline__ ResidualMma(const ResidualStageParams<T>& p, T* shared)
      : p_(p), shared_(shared), tile_(p, kMmaRows), pixels_(p, tile_) {}

  __device__ __forceinline__ void run() {
    const int steps = (p_.depth + kMmaDepth - 1) / kMmaDepth;
    bring_weight(0);
    bring_pixels(0);
    copy_async_wait<0>();
    __syncthreads();
    bring_pixels(1);
    pool(0);
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      copy_async_wait<0>();
      __syncthreads();
      if (s + 1 < steps) {
        bring_weight(s + 1);
        bring_pixels(s + 2);
      }
      // Half of the warps pool while the others keep the tensor cores busy.
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if ((turn + warp() / 4) % 2 == 0) {
          multiply(s);
        } else if (s + 1 < steps) {
          pool(s + 1);
        }
      }
    }
    __syncthreads();
    write();
  }

 private:
  __device__ __forceinline__ static int lane() {
    return opaque(static_cast<int>(threadIdx.x)) % 32;
  }
  __device__ __forceinline__ static int warp() {
    return opaque(static_cast<int>(threadIdx.x)) / 32;
  }
  // The first ones of the warp in the block.
  __device__ __forceinline__ static int pixel() {
    return kChannelsLast ? warp() % 4 * kMmaWarpRows : warp() % 2 * kMmaWarpColumns;
  }
  __device__ __forceinline__ static int channel() {
    return kChannelsLast ? warp() / 4 * kMmaWarpColumns : warp() / 2 * kMmaWarpRows;
  }

  __device__ __forceinline__ T* operand(int s) const {
    return shared_ + 2 * Pixels::kElements + s % 2 * kOperand;
  }
  __device__ __forceinline__ T* weight(int s) const {
    return shared_ + 2 * (Pixels::kElements + kOperand) + s % 2 * p_.tile_channels * kMmaDepth;
  }

  __device__ __forceinline__ void bring_pixels(int s) const {
    if (s * kMmaDepth < p_.depth) {
      pixels_.bring(s * kMmaDepth, shared_ + s % 2 * Pixels::kElements);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void pool(int s) const {
    T* const to = operand(s);
    pixels_.pool(s * kMmaDepth, shared_ + s % 2 * Pixels::kElements,
                 [to](int channel, int pixel, const typename Pixels::Pooled& pooled) {
                   if constexpr (kChannelsLast) {
                     to[mma_deep_place(pixel, channel)] = pooled[0];
                     to[mma_deep_place(pixel + 1, channel)] = pooled[1];
                   } else {
                     store_vector(to + mma_wide_place(channel, pixel), pooled);
                   }
                 });
  }

  // Zeros for what is not there.
  __device__ __forceinline__ void bring_weight(int s) const {
    constexpr int kRowVectors = kMmaDepth / kMmaVector;
    const int32_t channel = opaque(tile_.channel);
    const int thread = opaque(static_cast<int>(threadIdx.x));
    const int k = s * kMmaDepth + thread % kRowVectors * kMmaVector;
    // Each thread brings a vector of two rows, half of the tile apart.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = thread / kRowVectors + i * (p_.tile_channels / 2);
      const bool in_rows = row < p_.depth - channel;
      const T* const from = p_.weight + int64_t{channel + row} * p_.depth + k;
      T* const to = weight(s) + mma_deep_place(row, k % kMmaDepth);
      const int inside = in_rows ? p_.depth - k : 0;
      if (p_.weight_vectors) {
        copy_async_16(to, inside > 0 ? from : p_.weight, inside > 0);
        continue;
      }
      Vector<T, kMmaVector> values;
#pragma unroll
      for (int e = 0; e < kMmaVector; ++e) {
        values[e] = e < inside ? from[e] : from_accumulate<T>(0);
      }
      store_vector(to, values);
    }
  }

  __device__ __forceinline__ void multiply(int s) {
    const int lane = ResidualMma::lane();
    const T* const left = kChannelsLast ? operand(s) : weight(s);
    const T* const right = kChannelsLast ? weight(s) : operand(s);
    const int row = kChannelsLast ? pixel() : channel();
    const int column = kChannelsLast ? channel() : pixel();
#pragma unroll 1
    for (int k = 0; k < kMmaDepth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrix_x4(a[i],
                       left + mma_deep_place(row + 16 * i + lane % 16, k + lane / 16 * kMmaVector));
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {  // eight columns, twice, both halves of the depth
        uint32_t b[2][2];
        if constexpr (kChannelsLast) {
          uint32_t both[4];
          load_matrix_x4(both, right + mma_deep_place(column + 8 * j + lane / 16 * 8 + lane % 8,
                                                      k + lane / 8 % 2 * kMmaVector));
          b[0][0] = both[0];
          b[0][1] = both[1];
          b[1][0] = both[2];
          b[1][1] = both[3];
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            load_matrix_x2_transposed(b[h],
                                      right + mma_wide_place(k + lane % 16, column + 8 * (j + h)));
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            mma_m16n8k16<T>(sums_[i][j + h], a[i], b[h]);
          }
        }
      }
    }
  }

  // Through shared memory, so that rows leave in long pieces. What a warp writes there is its own.
  __device__ __forceinline__ void write() const {
    const int lane = ResidualMma::lane();
    constexpr int kOfRow = kMmaWarpColumns / kMmaVector;
    auto* const sums = reinterpret_cast<float*>(shared_) + warp() * 16 * kMmaSumPitch;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Vector<float, 2> pair;
          pair[0] = sums_[i][j][2 * half];
          pair[1] = sums_[i][j][2 * half + 1];
          store_vector(sums + (lane / 4 + 8 * half) * kMmaSumPitch + 8 * j + lane % 4 * 2, pair);
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int r = 0; r < 16; r += 32 / kOfRow) {
        const int row = r + lane / kOfRow;
        const int column = lane % kOfRow * kMmaVector;
        // Lanes 4 vectors apart begin with different halves: they lie in the same banks.
        const int first = lane & 4;
        const float* const from = sums + row * kMmaSumPitch + column;
        const auto one = load_vector<4>(from + first);
        const auto other = load_vector<4>(from + (first ^ 4));
        float sum[kMmaVector];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[e] = first == 0 ? one[e] : other[e];
          sum[e + 4] = first == 0 ? other[e] : one[e];
        }
        finish_residual<T, kChannelsLast>(
            p_, tile_, pixel() + (kChannelsLast ? 16 * i + row : column),
            tile_.channel + channel() + (kChannelsLast ? column : 16 * i + row), sum);
      }
      __syncwarp();
    }
  }

  const ResidualStageParams<T>& p_;
  T* shared_;
  ResidualTile<kChannelsLast> tile_;
  Pixels pixels_;
  float sums_[2][8][4] = {};
};

template <class T, bool kChannelsLast, int kSize, bool kOffsets>
__global__ __launch_bounds__(kMmaThreads, 1) void residual_mma_kernel(
    const __grid_constant__ ResidualStageParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(T, shared);
  ResidualMma<T, kChannelsLast, kSize, kOffsets>(p, shared).run();
}

}  // namespace pydense
