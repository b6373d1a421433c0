// SPDX-License-Identifier: Apache-2.0
// The product of a stage on tensor cores, for 16-bit types with sums in float: blocks of 128 x 128,
// a warp 32 x 64 of it, operands through shared memory in stages of which one is on its way while
// the other is at work.
#pragma once

#include "chained_residual_pool/residual_product.cuh"
#include "common/mma.cuh"

namespace pydense {

constexpr int kMmaTile = 128;  // rows and columns of a block
constexpr int kMmaDepth = 32;  // of a stage
constexpr int kMmaThreads = 256;
constexpr int kMmaWarpRows = 32;
constexpr int kMmaWarpColumns = 64;
constexpr int kMmaVector = 8;
// A wide operand is [32, 128] in shared memory, with 16 bytes more in a row than it holds: eight
// rows then lie in all banks. A deep one is [128, 32]: there the four vectors of a row change
// places.
constexpr int kMmaWidePitch = kMmaTile + kMmaVector;
constexpr int kMmaOperand = kMmaDepth * kMmaWidePitch;  // elements, of the larger one
constexpr int kMmaOperandBytes = 2 * 2 * kMmaOperand * 2;
// Sums on their way out: 16 rows of a warp.
constexpr int kMmaSumPitch = kMmaWarpColumns + kMmaVector;
constexpr int kMmaSumBytes = kMmaThreads / 32 * 16 * kMmaSumPitch * 4;
constexpr int kMmaSharedBytes = kMmaSumBytes > kMmaOperandBytes ? kMmaSumBytes : kMmaOperandBytes;

__device__ __forceinline__ int mma_wide_place(int k, int column) {
  return k * kMmaWidePitch + column;
}
// Of the vector that begins at k.
__device__ __forceinline__ int mma_deep_place(int row, int k) {
  return row * kMmaDepth + ((k / kMmaVector) ^ (row / 2 % 4)) * kMmaVector;
}

template <class T, bool kChannelsLast>
class ResidualMma {
 public:
  __device__ __forceinline__ ResidualMma(const ResidualProductParams<T>& p, T* shared)
      : p_(p),
        shared_(shared),
        tile_(p, kMmaTile, kMmaTile),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % 32),
        warp_row_(thread_ / 32 / 2 * kMmaWarpRows),
        warp_column_(thread_ / 32 % 2 * kMmaWarpColumns) {}

  __device__ __forceinline__ void run() {
    const int64_t stages = (p_.depth + kMmaDepth - 1) / kMmaDepth;
    load_stage(0);
    for (int64_t s = 0; s < stages; ++s) {
      if (s + 1 < stages) {
        load_stage(s + 1);
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncthreads();
      multiply(shared_ + s % 2 * 2 * kMmaOperand);
      __syncthreads();
    }
    write();
  }

 private:
  __device__ __forceinline__ void load_stage(int64_t s) const {
    T* const to = shared_ + s % 2 * 2 * kMmaOperand;
    const int64_t k = s * kMmaDepth;
    load_operand<kMmaDepth>(p_.left, p_.depth, tile_.row, p_.rows, k, p_.depth, to);
    if constexpr (kChannelsLast) {
      load_operand<kMmaDepth>(p_.right, p_.depth, tile_.column, p_.columns, k, p_.depth,
                              to + kMmaOperand);
    } else {
      load_operand<kMmaTile>(p_.right + tile_.image * p_.depth * p_.columns, p_.columns, k,
                             p_.depth, tile_.column, p_.columns, to + kMmaOperand);
    }
    copy_async_commit();
  }

  // kWidth elements from column `left` on of rows from `top` on, 4096 / kWidth of them. Zeros
  // outside of [0, rows) x [0, columns).
  template <int kWidth>
  __device__ __forceinline__ void load_operand(const T* from, int64_t pitch, int64_t top,
                                               int64_t rows, int64_t left, int64_t columns,
                                               T* to) const {
    constexpr int kOfRow = kWidth / kMmaVector;
    constexpr int kVectors = kMmaTile * kMmaDepth / kMmaVector;
#pragma unroll
    for (int i = 0; i < kVectors / kMmaThreads; ++i) {
      const int vector = thread_ + i * kMmaThreads;
      const int own_row = vector / kOfRow;
      const int own_column = vector % kOfRow * kMmaVector;
      T* const place = to + (kWidth == kMmaDepth ? mma_deep_place(own_row, own_column)
                                                 : mma_wide_place(own_row, own_column));
      const int64_t row = top + own_row;
      const int64_t column = left + own_column;
      const bool inside = row < rows && column < columns;
      const T* const source = inside ? from + row * pitch + column : from;
      if (p_.operand_vectors) {
        copy_async_16(place, source, inside);
        continue;
      }
      Vector<T, kMmaVector> values;
#pragma unroll
      for (int e = 0; e < kMmaVector; ++e) {
        values[e] = inside && column + e < columns ? source[e] : from_accumulate<T>(0);
      }
      store_vector(place, values);
    }
  }

  __device__ __forceinline__ void multiply(const T* left) {
    const T* const right = left + kMmaOperand;
#pragma unroll
    for (int k = 0; k < kMmaDepth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrix_x4(a[i], left + mma_deep_place(warp_row_ + 16 * i + lane_ % 16,
                                                   k + lane_ / 16 * kMmaVector));
      }
      uint32_t b[8][2];
      if constexpr (kChannelsLast) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {  // tiles: eight columns in both halves of the depth, twice
          uint32_t both[4];
          load_matrix_x4(both,
                         right + mma_deep_place(warp_column_ + 8 * j + lane_ / 16 * 8 + lane_ % 8,
                                                k + lane_ / 8 % 2 * kMmaVector));
          b[j][0] = both[0];
          b[j][1] = both[1];
          b[j + 1][0] = both[2];
          b[j + 1][1] = both[3];
        }
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          load_matrix_x2_transposed(b[j],
                                    right + mma_wide_place(k + lane_ % 16, warp_column_ + 8 * j));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          mma_m16n8k16<T>(sums_[i][j], a[i], b[j]);
        }
      }
    }
  }

  // Through shared memory, so that rows leave in long pieces. What a warp writes there is its own.
  __device__ __forceinline__ void write() const {
    constexpr int kOfRow = kMmaWarpColumns / kMmaVector;
    auto* const sums = reinterpret_cast<float*>(shared_) + thread_ / 32 * 16 * kMmaSumPitch;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Vector<float, 2> pair;
          pair[0] = sums_[i][j][2 * half];
          pair[1] = sums_[i][j][2 * half + 1];
          store_vector(sums + (lane_ / 4 + 8 * half) * kMmaSumPitch + 8 * j + lane_ % 4 * 2, pair);
        }
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < 16; r += 32 / kOfRow) {
        const int row = r + lane_ / kOfRow;
        const int column = lane_ % kOfRow * kMmaVector;
        // Lanes 4 vectors apart begin with different halves: they lie in the same banks.
        const int first = lane_ & 4;
        const float* const from = sums + row * kMmaSumPitch + column;
        const auto one = load_vector<4>(from + first);
        const auto other = load_vector<4>(from + (first ^ 4));
        float sum[kMmaVector];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[e] = first == 0 ? one[e] : other[e];
          sum[e + 4] = first == 0 ? other[e] : one[e];
        }
        finish_residual<T, kChannelsLast>(p_, tile_.image, tile_.row + warp_row_ + 16 * i + row,
                                          tile_.column + warp_column_ + column, sum);
      }
      __syncwarp();
    }
  }

  const ResidualProductParams<T>& p_;
  T* shared_;
  ResidualTile<kChannelsLast> tile_;
  int thread_;
  int lane_;
  int warp_row_;  // in the block's tile
  int warp_column_;
  float sums_[2][8][4] = {};
};

template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kMmaThreads, 2) void residual_mma_kernel(
    const __grid_constant__ ResidualProductParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(T, shared);
  ResidualMma<T, kChannelsLast>(p, shared).run();
}

}  // namespace pydense
