// SPDX-License-Identifier: Apache-2.0
// Kernels with mistakes that can be switched on, for test_planted.cpp: what the shim must find.
#pragma once

#include "common/launch.cuh"

namespace planted {

using pydense::from_float;
using pydense::to_float;

enum Bug {
  kNone,
  kLostClamp,
  kTailOffByOne,
  kReadPastTheRow,
  kGridTooHigh,
  kIndexOf32Bits,
  kMaskOfAbsentLanes,
  kSharedReusedWithoutBarrier,
  kMissingBarrier,
  kUninitialisedShared,
  kDivergentBarrier,
  kMisalignedVector,
  kReturnBeforeShuffle,
  kSharedOverrun,
  kShiftOfAllBits,
  kPlainInsert,
  kPlainCounter,
  kUnsynchronisedRead,
  kProbeWithoutWrap,
  kScatterWithoutAtomics,
  kWaitsForTooFewGroups,
  kStageOverwritten,
};

// 1. Linear interpolation along rows by an integer factor: [rows, n] to [rows, n * factor].
template <Bug B, class T>
__global__ void __launch_bounds__(64)
    interpolate(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int n, int factor) {
  const int out = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (B == kTailOffByOne ? out > n * factor : out >= n * factor) {
    return;
  }
  const float at = fmaxf((static_cast<float>(out) + 0.5f) / static_cast<float>(factor) - 0.5f, 0.f);
  const int left = min(static_cast<int>(at), n - 1);
  const int right = B == kLostClamp ? left + 1 : min(left + 1, n - 1);
  const float w = at - static_cast<float>(left);
  for (int64_t row = blockIdx.z; row < rows; row += gridDim.z) {
    const int64_t line =
        B == kIndexOf32Bits ? static_cast<int64_t>(static_cast<int>(row) * n) : row * n;
    const T* from = x + line + (B == kReadPastTheRow ? 1 : 0);
    y[row * n * factor + out] =
        from_float<T>((1 - w) * to_float(from[left]) + w * to_float(from[right]));
  }
}
template <Bug B, class T>
void run_interpolate(const T* x, T* y, int64_t rows, int n, int factor) {
  const auto z = static_cast<unsigned>(B == kGridTooHigh || rows < 65535 ? rows : 65535);
  const pydense::LaunchConfig config = {dim3((static_cast<unsigned>(n * factor) + 63) / 64, 1, z),
                                        dim3(64), 0, 0, nullptr};
  PYDENSE_LAUNCH((interpolate<B, T>), config, x, y, rows, n, factor);
}

// 2. log(sum(exp(x))) of each row by a block: vectors, shuffles, the same shared slots used twice.
template <Bug B>
__device__ __forceinline__ float reduce(float v, bool maximum) {
  __shared__ float parts[32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if (B != kMaskOfAbsentLanes || lane < 24) {
    for (int d = 16; d > 0; d /= 2) {
      const float other = __shfl_xor_sync(0xFFFFFFFFU, v, d);
      v = maximum ? fmaxf(v, other) : v + other;
    }
  }
  if (B != kSharedReusedWithoutBarrier) {
    __syncthreads();
  }
  if (lane == 0) {
    parts[B == kSharedOverrun ? warp + 31 : warp] = v;
  }
  if (B == kDivergentBarrier && warp == 0) {
    __syncthreads();
  } else if (B != kMissingBarrier) {
    __syncthreads();
  }
  const bool used = B == kUninitialisedShared || lane < static_cast<int>(blockDim.x) / 32;
  v = used ? parts[lane] : maximum ? -INFINITY : 0.f;
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFU, v, d);
    v = maximum ? fmaxf(v, other) : v + other;
  }
  return v;
}
template <Bug B>
__global__ void __launch_bounds__(256)
    log_sum_exp(const float* __restrict__ x, float* __restrict__ y, int n) {
  const float* row = x + static_cast<size_t>(blockIdx.x) * n;
  const int vectors = B == kMisalignedVector || n % 4 == 0 ? n / 4 : 0;
  float top = -INFINITY;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const auto v = pydense::load_vector<4>(row + 4 * i);
    top = fmaxf(fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])), top);
  }
  for (int i = 4 * vectors + threadIdx.x; i < n; i += blockDim.x) {
    top = fmaxf(top, row[i]);
  }
  if (B == kReturnBeforeShuffle && static_cast<int>(threadIdx.x) >= n) {
    return;
  }
  top = reduce<B>(top, true);
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    sum += expf(row[i] - top);
  }
  sum = reduce<B>(sum, false);
  if (threadIdx.x == 0) {
    y[blockIdx.x] = top + logf(sum);
  }
}
template <Bug B>
void run_log_sum_exp(const float* x, float* y, int rows, int n, int threads) {
  const pydense::LaunchConfig config = {dim3(rows), dim3(threads), 0, 0, nullptr};
  PYDENSE_LAUNCH(log_sum_exp<B>, config, x, y, n);
}

// 3. A hash table with open addressing: numbers the distinct keys.
constexpr unsigned long long kEmpty = ~0ULL;
struct Table {
  const unsigned long long* keys;  // [n]
  int n;
  unsigned long long* slots;  // [capacity], kEmpty
  int* ids;                   // [capacity]
  int* count;                 // 0
  int* slot_of;               // [n]
  unsigned capacity;
  int shift;  // of the hash; 64 is the mistake of kShiftOfAllBits
};
template <Bug B>
__global__ void __launch_bounds__(256) insert(Table table) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= table.n) {
    return;
  }
  const unsigned long long key = table.keys[i];
  unsigned at = static_cast<unsigned>((key ^ (key >> table.shift)) * 2654435761U) % table.capacity;
  for (unsigned probe = 0; probe < table.capacity; ++probe) {
    unsigned long long before;
    if (B == kPlainInsert) {
      before = table.slots[at];
      if (before == kEmpty) {
        table.slots[at] = key;
      }
    } else {
      before = atomicCAS(&table.slots[at], kEmpty, key);
    }
    if (before == kEmpty) {
      table.ids[at] = B == kPlainCounter ? (*table.count)++ : atomicAdd(table.count, 1);
    }
    if (before == kEmpty || before == key) {
      const bool early = B == kUnsynchronisedRead && before == key && table.ids[at] < -100;
      table.slot_of[i] = early ? -1 : static_cast<int>(at);
      return;
    }
    at = B == kProbeWithoutWrap ? at + 1 : (at + 1) % table.capacity;
  }
}
template <Bug B>
void run_insert(const Table& table) {
  const pydense::LaunchConfig config = {dim3((table.n + 255) / 256), dim3(256), 0, 0, nullptr};
  PYDENSE_LAUNCH(insert<B>, config, table);
}

// 4. y[index[i]] += x[i].
template <Bug B>
__global__ void __launch_bounds__(128) scatter(const float* x, float* y, const int* index, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) {
    return;
  }
  if (B == kScatterWithoutAtomics) {
    y[index[i]] += x[i];
  } else {
    atomicAdd(&y[index[i]], x[i]);
  }
}
template <Bug B>
void run_scatter(const float* x, float* y, const int* index, int n) {
  const pydense::LaunchConfig config = {dim3((n + 127) / 128), dim3(128), 0, 0, nullptr};
  PYDENSE_LAUNCH(scatter<B>, config, x, y, index, n);
}

}  // namespace planted
