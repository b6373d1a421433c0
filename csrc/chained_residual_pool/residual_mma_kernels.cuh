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
        warp_column_(thread_ / 32 % 2 * kMmaWarpColumns),
        left_(p.left + (tile_.row + deep_row()) * p.depth + deep_k()),
        left_rows_(within_tile(p.rows - tile_.row)) {
    if constexpr (kChannelsLast) {
      right_ = p.right + (tile_.column + deep_row()) * p.depth + deep_k();
    } else {
      right_ =
          p.right + (tile_.image * p.depth + wide_k()) * p.columns + tile_.column + wide_column();
    }
    right_columns_ = within_tile(p.columns - tile_.column);
  }

  __device__ __forceinline__ void run() {
    const int stages = (p_.depth + kMmaDepth - 1) / kMmaDepth;
    load_stage(0);
    for (int s = 0; s < stages; ++s) {
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
  __device__ __forceinline__ static int within_tile(int64_t size) {
    return static_cast<int>(min(size, int64_t{kMmaTile}));
  }
  // The first of the two vectors of an operand that a thread brings; the second one lies
  // kDeepStep or kWideStep rows below.
  static constexpr int kDeepStep = kMmaThreads * kMmaVector / kMmaDepth;
  static constexpr int kWideStep = kMmaThreads * kMmaVector / kMmaTile;
  __device__ __forceinline__ int deep_row() const { return thread_ / (kMmaDepth / kMmaVector); }
  __device__ __forceinline__ int deep_k() const {
    return thread_ % (kMmaDepth / kMmaVector) * kMmaVector;
  }
  __device__ __forceinline__ int wide_k() const { return thread_ / (kMmaTile / kMmaVector); }
  __device__ __forceinline__ int wide_column() const {
    return thread_ % (kMmaTile / kMmaVector) * kMmaVector;
  }

  __device__ __forceinline__ void load_stage(int s) const {
    const int k = s * kMmaDepth;
    T* const to = shared_ + s % 2 * 2 * kMmaOperand;
    load_deep(left_, left_rows_, k, to);
    if constexpr (kChannelsLast) {
      load_deep(right_, right_columns_, k, to + kMmaOperand);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = wide_k() + i * kWideStep;
        const int inside = k + row < p_.depth ? right_columns_ - wide_column() : 0;
        load(right_ + (k + i * kWideStep) * p_.columns, inside,
             to + kMmaOperand + mma_wide_place(row, wide_column()));
      }
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void load_deep(const T* from, int rows, int k, T* to) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = deep_row() + i * kDeepStep;
      const int inside = row < rows ? p_.depth - k - deep_k() : 0;
      load(from + int64_t{i * kDeepStep} * p_.depth + k, inside,
           to + mma_deep_place(row, deep_k()));
    }
  }

  // A vector of which `inside` elements are there, at most; zeros for the others.
  __device__ __forceinline__ void load(const T* from, int inside, T* to) const {
    if (p_.operand_vectors) {
      copy_async_16(to, inside > 0 ? from : p_.left, inside > 0);
      return;
    }
    Vector<T, kMmaVector> values;
#pragma unroll
    for (int e = 0; e < kMmaVector; ++e) {
      values[e] = e < inside ? from[e] : from_accumulate<T>(0);
    }
    store_vector(to, values);
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
#pragma unroll
      for (int j = 0; j < 8; j += 2) {  // eight columns, twice, both halves of the depth
        uint32_t b[2][2];
        if constexpr (kChannelsLast) {
          uint32_t both[4];
          load_matrix_x4(both,
                         right + mma_deep_place(warp_column_ + 8 * j + lane_ / 16 * 8 + lane_ % 8,
                                                k + lane_ / 8 % 2 * kMmaVector));
          b[0][0] = both[0];
          b[0][1] = both[1];
          b[1][0] = both[2];
          b[1][1] = both[3];
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            load_matrix_x2_transposed(
                b[h], right + mma_wide_place(k + lane_ % 16, warp_column_ + 8 * (j + h)));
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
  const T* left_;  // of this thread's first vector
  const T* right_;
  int left_rows_;  // of the tile that are there
  int right_columns_;
  float sums_[2][8][4] = {};
};

template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kMmaThreads, 2) void residual_mma_kernel(
    const __grid_constant__ ResidualProductParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(T, shared);
  ResidualMma<T, kChannelsLast>(p, shared).run();
}

}  // namespace pydense
