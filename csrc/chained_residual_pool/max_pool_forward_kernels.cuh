// SPDX-License-Identifier: Apache-2.0
// Max pooling forward. A thread goes down a band of rows with a few neighbours of a row: it reduces
// each row along x from global memory, where the first-level cache serves what windows share, and
// keeps the reduced rows of a window in shared memory. No thread reads what another one keeps
// there, so nothing waits. What the windows of two rows share is reduced once.
#pragma once

#include "chained_residual_pool/max_pool.h"
#include "chained_residual_pool/max_pool_math.h"
#include "common/cuda.cuh"

namespace pydense {

constexpr int kPoolThreads = 128;

template <class T>
struct PoolForwardParams {
  int64_t threads;   // that have something to do
  int64_t columns;   // of them, side by side in a row
  int64_t channels;  // planes of an image
  int64_t height;
  int64_t row;   // elements
  int64_t unit;  // elements of a pixel
  int32_t size;  // of the window
  int32_t band;  // rows of a thread, even
  int32_t bands;
  int32_t slots;  // for reduced rows, a power of 2, more than the window has
  const T* x;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t row_stride;
  T* out;            // dense
  uint8_t* offsets;  // dense
};

// Bytes of shared memory for the rows of one thread.
template <class T, int kVector>
constexpr int kPoolSlotBytes = static_cast<int>(kVector * (sizeof(T) + 1));

template <class A>
__device__ __forceinline__ A lowest_of_pool() {
  return -static_cast<A>(INFINITY);
}

// Some neighbours of a reduced row: the maxima along x, and at which columns of their windows.
template <class T, int kVector>
struct ReducedRow {
  Accumulate<T> best[kVector];
  int code[kVector];
};

template <class T, int kVector, bool kOffsets>
__device__ __forceinline__ void take_row(const ReducedRow<T, kVector>& row, int code,
                                         ReducedRow<T, kVector>& best) {
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    portable::take_later<kOffsets>(row.best[e], row.code[e] + code, best.best[e], best.code[e]);
  }
}

// kAlong: the neighbours are columns of one channel. Else they are channels of a pixel, or there is
// one number. kSize: of the window, 0 where p.size alone says it.
template <class T, int kVector, bool kAlong, int kSize, bool kOffsets>
class PoolColumn {
  using A = Accumulate<T>;
  using Row = ReducedRow<T, kVector>;
  static constexpr int kUnroll = kSize > 0 ? kSize : 1;

 public:
  __device__ __forceinline__ PoolColumn(const PoolForwardParams<T>& p, int64_t index, T* values)
      : p_(p), values_(values + threadIdx.x * kVector) {
    codes_ = reinterpret_cast<uint8_t*>(values + p.slots * kPoolThreads * kVector) +
             threadIdx.x * kVector;
    const int64_t group = index / p.columns;
    at_ = (index - group * p.columns) * kVector;
    plane_ = group / p.bands;
    first_row_ = static_cast<int>(group - plane_ * p.bands) * p.band;
    end_row_ = static_cast<int>(min(int64_t{first_row_} + p.band, p.height));
    const int64_t batch = plane_ / p.channels;
    x_ = p.x + batch * p.batch_stride + (plane_ - batch * p.channels) * p.channel_stride;
    pixel_ = at_ / p.unit;
  }

  __device__ __forceinline__ void run() {
    const int reach = size() / 2;
    for (int y = first_row_ - reach; y < first_row_ + reach; ++y) {
      put(y, reduce(y));
    }
    for (int y = first_row_; y < end_row_; y += 2) {
      const Row upper = reduce(y + reach);
      const Row lower = reduce(y + reach + 1);
      put(y + reach, upper);
      put(y + reach + 1, lower);
      emit(y);
    }
  }

 private:
  __device__ __forceinline__ int size() const { return kSize > 0 ? kSize : p_.size; }

  // Outside of the picture all is -inf, which never wins.
  __device__ __forceinline__ Row reduce(int y) const {
    Row row;
    if (y < 0 || y >= p_.height || y >= end_row_ + size() / 2) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        row.best[e] = lowest_of_pool<A>();
        row.code[e] = 0;
      }
      return row;
    }
    const T* const from = x_ + y * p_.row_stride;
    if constexpr (kAlong) {
      reduce_along(from, row);
    } else {
      reduce_across(from, row);
    }
    return row;
  }

  __device__ __forceinline__ Row load(const T* from, int64_t at) const {
    Row row;
    if (at >= 0 && at < p_.row) {
      const Vector<T, kVector> v = load_vector<kVector>(from + at);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        row.best[e] = to_accumulate(v[e]);
        row.code[e] = 0;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        row.best[e] = lowest_of_pool<A>();
        row.code[e] = 0;
      }
    }
    return row;
  }

  // Windows step from pixel to pixel.
  __device__ __forceinline__ void reduce_across(const T* from, Row& row) const {
    const int reach = size() / 2;
    row = load(from, at_ - reach * p_.unit);
#pragma unroll kUnroll
    for (int j = 1; j < size(); ++j) {
      take_row<T, kVector, kOffsets>(load(from, at_ + (j - reach) * p_.unit), j, row);
    }
  }

  // Windows step through the vectors around; two neighbours share all but their ends.
  __device__ __forceinline__ void reduce_along(const T* from, Row& row) const {
    static_assert(kSize > 0, "a window of a size that is not known would need local memory");
    constexpr int kReach = kSize / 2;
    constexpr int kNear = (kReach + kVector - 1) / kVector;
    A v[(2 * kNear + 1) * kVector];
#pragma unroll
    for (int n = -kNear; n <= kNear; ++n) {
      const Row part = load(from, at_ + n * kVector);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        v[(n + kNear) * kVector + e] = part.best[e];
      }
    }
#pragma unroll
    for (int e = 0; e < kVector; e += 2) {
      const int first = kNear * kVector + e - kReach;
      A common = v[first + 1];
      int code = 0;  // in the right one's window
#pragma unroll
      for (int j = 1; j < kSize - 1; ++j) {
        portable::take_later<kOffsets>(v[first + 1 + j], j, common, code);
      }
      row.best[e] = v[first];
      row.code[e] = 0;
      portable::take_later<kOffsets>(common, code + 1, row.best[e], row.code[e]);
      row.best[e + 1] = common;
      row.code[e + 1] = code;
      portable::take_later<kOffsets>(v[first + kSize], kSize - 1, row.best[e + 1], row.code[e + 1]);
    }
  }

  __device__ __forceinline__ int slot(int y) const {
    return (y & (p_.slots - 1)) * kPoolThreads * kVector;
  }

  __device__ __forceinline__ void put(int y, const Row& row) const {
    Vector<T, kVector> v;
    Vector<uint8_t, kVector> codes;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      v[e] = from_accumulate<T>(row.best[e]);
      codes[e] = static_cast<uint8_t>(row.code[e]);
    }
    store_vector(values_ + slot(y), v);
    if constexpr (kOffsets) {
      store_vector(codes_ + slot(y), codes);
    }
  }

  __device__ __forceinline__ Row get(int y) const {
    Row row;
    const Vector<T, kVector> v = load_vector<kVector>(values_ + slot(y));
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      row.best[e] = to_accumulate(v[e]);
      row.code[e] = 0;
    }
    if constexpr (kOffsets) {
      const Vector<uint8_t, kVector> codes = load_vector<kVector>(codes_ + slot(y));
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        row.code[e] = codes[e];
      }
    }
    return row;
  }

  // Rows y and y + 1 of the result.
  __device__ __forceinline__ void emit(int y) const {
    const int reach = size() / 2;
    Row common = get(y + 1 - reach);
#pragma unroll kUnroll
    for (int j = 1; j < size() - 1; ++j) {  // row j of the lower window
      take_row<T, kVector, kOffsets>(get(y + 1 - reach + j), j << portable::kPoolRowBits, common);
    }
    Row upper = get(y - reach);
    take_row<T, kVector, kOffsets>(common, portable::kPoolColumns, upper);
    write(y, upper);
    if (y + 1 < end_row_) {
      take_row<T, kVector, kOffsets>(get(y + 1 + reach), (size() - 1) << portable::kPoolRowBits,
                                     common);
      write(y + 1, common);
    }
  }

  __device__ __forceinline__ void write(int y, const Row& row) const {
    const int reach = size() / 2;
    const int64_t to = (plane_ * p_.height + y) * p_.row + at_;
    Vector<T, kVector> v;
    Vector<uint8_t, kVector> codes;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      v[e] = from_accumulate<T>(row.best[e]);
      if constexpr (kOffsets) {
        // -inf alone: the first element of the picture in the window.
        const int64_t column = reach - (pixel_ + (kAlong ? e : 0));
        const int first =
            max(reach - y, 0) << portable::kPoolRowBits | static_cast<int>(max(column, int64_t{0}));
        codes[e] = static_cast<uint8_t>(row.best[e] == lowest_of_pool<A>() ? first : row.code[e]);
      }
    }
    store_global_vector(p_.out + to, v);
    if constexpr (kOffsets) {
      store_global_vector(p_.offsets + to, codes);
    }
  }

  const PoolForwardParams<T>& p_;
  T* values_;
  uint8_t* codes_;
  const T* x_;
  int64_t at_;     // of the first neighbour in a row
  int64_t pixel_;  // its column
  int64_t plane_;
  int first_row_;
  int end_row_;
};

template <class T, int kVector, bool kAlong, int kSize, bool kOffsets>
__global__ __launch_bounds__(kPoolThreads) void max_pool_forward_kernel(
    const __grid_constant__ PoolForwardParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(T, shared);
  const int64_t index = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  if (index < p.threads) {
    PoolColumn<T, kVector, kAlong, kSize, kOffsets>(p, index, shared).run();
  }
}

}  // namespace pydense
