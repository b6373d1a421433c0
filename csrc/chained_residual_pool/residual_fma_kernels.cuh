// SPDX-License-Identifier: Apache-2.0
// The product of a stage in float and double: every sum is one chain of fused multiply-adds along
// the depth, as the CPU's, with the same bits. A thread has kMicro x kMicro sums, in groups of
// kGroup neighbours. And the sum of residuals alone.
#pragma once

#include "chained_residual_pool/residual_product.cuh"
#include "upsample/upsample_math.h"

namespace pydense {

constexpr int kFmaThreads = 256;
constexpr int kFmaSide = 16;  // threads along each side of a tile
constexpr int kFmaDepth = 8;  // of a stage

// Sums of a thread along each side: what registers hold.
template <class T>
constexpr int kFmaMicro = 32 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kFmaTile = kFmaSide * kFmaMicro<T>;

template <class T, bool kChannelsLast>
class ResidualFma {
  static constexpr int kGroup = kResidualVector<T>;
  static constexpr int kMicro = kFmaMicro<T>;
  static constexpr int kTile = kFmaTile<T>;
  static constexpr int kPitch = kTile + kGroup;
  static_assert(kTile * kFmaDepth == kFmaThreads * kGroup);  // a group per thread and operand
  using Group = Vector<T, kGroup>;

 public:
  struct alignas(16) Shared {
    T left[2][kFmaDepth * kPitch];  // [depth, rows]
    T right[2][kFmaDepth * kPitch];
  };

  __device__ __forceinline__ ResidualFma(const ResidualProductParams<T>& p, Shared& shared)
      : p_(p),
        shared_(shared),
        tile_(p, kTile, kTile),
        thread_(static_cast<int>(threadIdx.x)),
        row_(thread_ / kFmaSide * kGroup),
        column_(thread_ % kFmaSide * kGroup),
        left_from_(p.left + (tile_.row + deep_row()) * p.depth + deep_k()),
        left_inside_(tile_.row + deep_row() < p.rows) {
    if constexpr (kChannelsLast) {
      right_from_ = p.right + (tile_.column + deep_row()) * p.depth + deep_k();
      right_inside_ = tile_.column + deep_row() < p.columns ? kGroup : 0;
    } else {
      const int64_t column = tile_.column + wide_column();
      right_from_ = p.right + (tile_.image * p.depth + wide_k()) * p.columns + column;
      right_inside_ = static_cast<int>(max(min(p.columns - column, int64_t{kGroup}), int64_t{0}));
    }
  }

  __device__ __forceinline__ void run() {
    const int stages = (p_.depth + kFmaDepth - 1) / kFmaDepth;
    fetch(0);
    put(0);
    __syncthreads();
    for (int s = 0; s < stages; ++s) {
      if (s + 1 < stages) {
        fetch(s + 1);
      }
      multiply(s % 2);
      if (s + 1 < stages) {
        put((s + 1) % 2);
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; j += kGroup) {
        T sum[kGroup];
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          sum[e] = sums_[i][j + e];
        }
        finish_residual<T, kChannelsLast>(p_, tile_.image, tile_.row + place(row_, i),
                                          tile_.column + place(column_, j), sum);
      }
    }
  }

 private:
  // Of number i of a thread's: groups lie a row of threads apart.
  __device__ __forceinline__ static int place(int first, int i) {
    return first + i / kGroup * kFmaSide * kGroup + i % kGroup;
  }

  // What a thread moves of an operand. Deep: the depth is along its rows.
  __device__ __forceinline__ int deep_row() const { return thread_ / (kFmaDepth / kGroup); }
  __device__ __forceinline__ int deep_k() const { return thread_ % (kFmaDepth / kGroup) * kGroup; }
  __device__ __forceinline__ int wide_k() const { return thread_ / (kTile / kGroup); }
  __device__ __forceinline__ int wide_column() const { return thread_ % (kTile / kGroup) * kGroup; }

  __device__ __forceinline__ void fetch(int s) {
    const int k = s * kFmaDepth;
    const int left_in_depth = p_.depth - k - deep_k();
    left_ = fetch_group(left_from_ + k, left_inside_ ? left_in_depth : 0);
    if constexpr (kChannelsLast) {
      right_ = fetch_group(right_from_ + k, right_inside_ > 0 ? left_in_depth : 0);
    } else {
      right_ =
          fetch_group(right_from_ + k * p_.columns, k + wide_k() < p_.depth ? right_inside_ : 0);
    }
  }

  // A group of which `inside` elements are there, at most; zeros for the others.
  __device__ __forceinline__ Group fetch_group(const T* from, int inside) const {
    if (p_.operand_vectors && inside > 0) {
      return load_vector<kGroup>(from);
    }
    Group values;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      values[e] = e < inside ? from[e] : T{};
    }
    return values;
  }

  __device__ __forceinline__ void put(int stage) {
    T* const left = shared_.left[stage];
    T* const right = shared_.right[stage];
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      left[(deep_k() + e) * kPitch + deep_row()] = left_[e];
    }
    if constexpr (kChannelsLast) {
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        right[(deep_k() + e) * kPitch + deep_row()] = right_[e];
      }
    } else {
      store_vector(right + wide_k() * kPitch + wide_column(), right_);
    }
  }

  __device__ __forceinline__ void multiply(int stage) {
#pragma unroll
    for (int k = 0; k < kFmaDepth; ++k) {
      T left[kMicro];
      T right[kMicro];
#pragma unroll
      for (int i = 0; i < kMicro; i += kGroup) {
        const auto a = load_vector<kGroup>(shared_.left[stage] + k * kPitch + place(row_, i));
        const auto b = load_vector<kGroup>(shared_.right[stage] + k * kPitch + place(column_, i));
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          left[i + e] = a[e];
          right[i + e] = b[e];
        }
      }
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) {
          sums_[i][j] = portable::exact_fma(left[i], right[j], sums_[i][j]);
        }
      }
    }
  }

  const ResidualProductParams<T>& p_;
  Shared& shared_;
  ResidualTile<kChannelsLast> tile_;
  int thread_;
  int row_;  // of this thread's first group
  int column_;
  const T* left_from_;  // this thread's group of the first stage
  const T* right_from_;
  bool left_inside_;
  int right_inside_;  // elements of the group that are there, at most
  Group left_;        // of the next stage
  Group right_;
  T sums_[kMicro][kMicro] = {};
};

template <class T, bool kChannelsLast>
__global__ __launch_bounds__(kFmaThreads, 2) void residual_fma_kernel(
    const __grid_constant__ ResidualProductParams<T> p) {
  __shared__ typename ResidualFma<T, kChannelsLast>::Shared shared;
  ResidualFma<T, kChannelsLast>(p, shared).run();
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
    store_vector(p.out + i * kVector, result);
  }
}

}  // namespace pydense
