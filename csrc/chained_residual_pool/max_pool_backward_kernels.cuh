// SPDX-License-Identifier: Apache-2.0
// Max pooling backward, as a gather in two steps. Down: what the windows of each column of the
// gradient give to a row. The windows of a column whose maximum lies in one row all have it at one
// place in that row, so a sum and this place are all there is to keep. Across: what the columns
// around an element give to it. Every sum has the order of the CPU's.
#pragma once

#include "chained_residual_pool/max_pool.h"
#include "chained_residual_pool/max_pool_math.h"
#include "common/cuda.cuh"

namespace pydense {

constexpr int kPoolBackwardThreads = 512;
constexpr int kPoolBackwardRows = 4;  // of a thread

template <class T>
struct PoolBackwardParams {
  int64_t groups;    // of kPoolBackwardRows rows, in all planes
  int64_t channels;  // planes of an image
  int64_t height;
  int64_t width;
  int64_t unit;  // elements of a pixel
  int32_t size;  // of the window
  int32_t groups_of_plane;
  int32_t tile_columns;   // pixels of the result in a block
  int32_t halo_columns;   // before them, and behind; none where the tile is all of a row
  int32_t part_channels;  // of a pixel, in a block
  uint32_t tiles;         // across a row: of pixels and parts of them
  uint32_t parts;
  const T* grad;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t row_stride;
  const uint8_t* offsets;  // dense
  const T* addend;         // dense, or null
  T* result;               // dense
};

// Neighbours that a thread sums, and that move in one access where memory allows it.
template <class T>
constexpr int kPoolBackwardElements = 16 / static_cast<int>(sizeof(Accumulate<T>));

// As kAlong and kSize of the forward kernel.
template <class T, int kVector, bool kAlong, int kSize>
class PoolGather {
  using A = Accumulate<T>;
  using Sums = Vector<A, kVector>;
  using Columns = Vector<uint8_t, kVector>;
  static constexpr uint8_t kNowhere = 255;
  static constexpr int kRows = kPoolBackwardRows;

 public:
  // sums: [rows of the block, blockDim.x] vectors, the columns' bytes behind them.
  __device__ __forceinline__ PoolGather(const PoolBackwardParams<T>& p, A* sums)
      : p_(p), x_(static_cast<int>(threadIdx.x)), width_(static_cast<int>(blockDim.x)) {
    const int rows = static_cast<int>(blockDim.y) * kRows;
    const int own = (static_cast<int>(threadIdx.y) * kRows * width_ + x_) * kVector;
    sums_ = sums + own;
    columns_ = reinterpret_cast<uint8_t*>(sums + rows * width_ * kVector) + own;
    const unsigned tile = blockIdx.x % p.tiles;
    const int64_t group = int64_t{blockIdx.x / p.tiles} * blockDim.y + threadIdx.y;
    const int64_t plane = group / p.groups_of_plane;
    y_ = static_cast<int>(group - plane * p.groups_of_plane) * kRows;
    const int element = x_ * kVector;
    const int column = element / p.part_channels;
    const int64_t channel =
        int64_t{tile % p.parts} * p.part_channels + (element - column * p.part_channels);
    const int64_t left = int64_t{tile / p.parts} * p.tile_columns;
    const int64_t pixel = left - p.halo_columns + column;
    // Of a gradient that is there, and of a result of this block.
    live_ = group < p.groups && pixel >= 0 && pixel < p.width && channel < p.unit;
    own_ = live_ && column >= p.halo_columns && column < p.halo_columns + p.tile_columns;
    at_ = pixel * p.unit + channel;
    const int64_t batch = plane / p.channels;
    grad_ = p.grad + batch * p.batch_stride + (plane - batch * p.channels) * p.channel_stride + at_;
    at_ += plane * p.height * p.width * p.unit;
  }

  __device__ __forceinline__ void run() const {
    down();
    __syncthreads();
    if (own_) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (y_ + r < p_.height) {
          across(r);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ int size() const { return kSize > 0 ? kSize : p_.size; }
  // What is not lies outside of the picture.
  __device__ __forceinline__ bool is_in_block(int vectors) const {
    return x_ + vectors >= 0 && x_ + vectors < width_;
  }
  __device__ __forceinline__ int64_t row() const { return p_.width * p_.unit; }

  __device__ __forceinline__ void down() const {
    const int reach = size() / 2;
    A sum[kRows][kVector];
    int column[kRows][kVector];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        sum[r][e] = A{};
        column[r][e] = kNowhere;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows - 1 + size(); ++i) {
      const int y = y_ - reach + i;
      if (!live_ || y < 0 || y >= p_.height) {
        continue;
      }
      const auto grad = load_vector<kVector>(grad_ + y * p_.row_stride);
      const auto offset = load_vector<kVector>(p_.offsets + at_ + y * row());
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const A value = to_accumulate(grad[e]);
        const int code = offset[e];
        const int to = i - 2 * reach + (code >> portable::kPoolRowBits);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          // Known to the compiler where the size is: the window reaches no other rows.
          if (kSize == 0 || (r <= i && r >= i - 2 * reach)) {
            const bool mine = to == r;
            sum[r][e] = mine ? sum[r][e] + value : sum[r][e];
            column[r][e] = mine ? code % portable::kPoolColumns : column[r][e];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Columns columns;
      Sums sums;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        sums[e] = sum[r][e];
        columns[e] = static_cast<uint8_t>(column[r][e]);
      }
      store_vector(sums_ + r * width_ * kVector, sums);
      store_vector(columns_ + r * width_ * kVector, columns);
    }
  }

  __device__ __forceinline__ void across(int r) const {
    const int reach = size() / 2;
    const A* const sums = sums_ + r * width_ * kVector;
    const uint8_t* const columns = columns_ + r * width_ * kVector;
    A total[kVector] = {};
    if constexpr (kAlong) {
      constexpr int kReach = (kSize > 0 ? kSize : kMaxPoolSize) / 2;
      constexpr int kNear = (kReach + kVector - 1) / kVector;
#pragma unroll
      for (int n = -kNear; n <= kNear; ++n) {
        if (kSize > 0 || ((n < 0 ? -n : n) - 1) * kVector < reach) {
          const bool inside = is_in_block(n);
          const Sums sum = load_vector<kVector>(sums + (inside ? n * kVector : 0));
          const Columns column = load_vector<kVector>(columns + (inside ? n * kVector : 0));
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
              const int d = n * kVector + i - e;  // from the element to the middle of the window
              if (d >= -kReach && d <= kReach) {
                total[e] = inside && column[i] == reach - d ? total[e] + sum[i] : total[e];
              }
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < size(); ++j) {
        const int to = (j - reach) * p_.part_channels;
        const bool inside = is_in_block(to / kVector);
        const Sums sum = load_vector<kVector>(sums + (inside ? to : 0));
        const Columns column = load_vector<kVector>(columns + (inside ? to : 0));
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          total[e] = inside && column[e] == size() - 1 - j ? total[e] + sum[e] : total[e];
        }
      }
    }
    const int64_t to = at_ + (y_ + r) * row();
    if (p_.addend != nullptr) {
      const auto addend = load_vector<kVector>(p_.addend + to);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        total[e] += to_accumulate(addend[e]);
      }
    }
    Vector<T, kVector> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      result[e] = from_accumulate<T>(total[e]);
    }
    store_global_vector(p_.result + to, result);
  }

  const PoolBackwardParams<T>& p_;
  int x_;
  int width_;  // of the block
  A* sums_;    // of this thread's first row
  uint8_t* columns_;
  const T* grad_;
  int64_t at_;  // in row 0 of a dense plane
  int y_;
  bool live_;
  bool own_;
};

template <class T, int kVector, bool kAlong, int kSize>
__global__ __launch_bounds__(kPoolBackwardThreads) void max_pool_backward_kernel(
    const __grid_constant__ PoolBackwardParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(Accumulate<T>, shared);
  PoolGather<T, kVector, kAlong, kSize>(p, shared).run();
}

}  // namespace pydense
