// SPDX-License-Identifier: Apache-2.0
// The Gaussian filter over all pairs of points, accurately: a thread has one or two queries, their
// features and sums in registers, and a block streams the keys through shared memory, from where
// all threads read the same key at a time. Kernel values are used where they are made; nothing of
// the N x N matrix is stored. Sums go by levels: a tile of keys, the tiles of a segment, and over
// segments (exact_sum_kernel); where they end depends on the points alone.
#pragma once

#include "common/cuda.cuh"
#include "common/exp2.cuh"

namespace pydense {

constexpr int kExactThreads = 128;
template <class T>
constexpr int kExactPoints = sizeof(T) == 4 ? 2 : 1;  // queries of a thread

template <class T>
struct ExactParams {
  const T* features;  // [images, dims, points]
  const T* values;    // [images, rows, points]; a row is a channel of one of an image's copies
  T* out;             // [segments, images, rows, points]
  int64_t feature_strides[3];
  int64_t value_strides[3];  // of batches, channels, points
  int64_t points;
  int64_t rows;      // of an image: copies * channels
  int64_t channels;  // of a copy
  int64_t copies;    // batches of an image
  int64_t all;       // images * rows * points
  int32_t dims;
  int32_t query_blocks;
  int32_t row_chunks;
  int32_t chunk_rows;  // of a chunk, at most kWidth
  int32_t segments;
  int32_t segment_tiles;
  bool self_term;
};

// kDims: of the features, zeros where they have fewer; 0 for any number, then kernel values are
// made over blocks of dimensions. kWidth: rows that are summed.
template <class T, int kDims, int kWidth>
class ExactFilter {
  static constexpr int kPoints = kExactPoints<T>;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kDimBlock = kDims == 0 ? 8 : (kDims + kVector - 1) / kVector * kVector;

  // Rows of 16-byte vectors, an odd number of them: threads write theirs without bank conflicts.
  static constexpr int stride_of(int count) {
    return count / kVector % 2 == 1 ? count : count + kVector;
  }
  static constexpr int kKeyStride = stride_of(kDimBlock);
  static constexpr int kValueStride = stride_of(kWidth);

 public:
  static constexpr int kKeys = kDims == 0 ? 8 : 64;  // of a tile
  static constexpr int kShared = kKeys * (kKeyStride + kValueStride);

  __device__ __forceinline__ ExactFilter(const ExactParams<T>& p, T* shared)
      : p_(p), keys_(shared), values_(shared + kKeys * kKeyStride) {
    uint32_t item = blockIdx.x;
    query_ = int64_t{item % static_cast<uint32_t>(p.query_blocks)} * (kExactThreads * kPoints) +
             threadIdx.x;
    item /= static_cast<uint32_t>(p.query_blocks);
    row_ = static_cast<int64_t>(item % static_cast<uint32_t>(p.row_chunks)) * p.chunk_rows;
    rows_ = static_cast<int>(min(int64_t{p.chunk_rows}, p.rows - row_));
    item /= static_cast<uint32_t>(p.row_chunks);
    segment_ = static_cast<int32_t>(item % static_cast<uint32_t>(p.segments));
    image_ = item / static_cast<uint32_t>(p.segments);
    features_ = p.features + image_ * p.feature_strides[0];
  }

  __device__ __forceinline__ void run() {
    if constexpr (kDims > 0) {
#pragma unroll
      for (int q = 0; q < kPoints; ++q) {
#pragma unroll
        for (int k = 0; k < kDims; ++k) {
          own_[q][k] = feature(k, query_of(q));
        }
      }
    }
    const int64_t first = int64_t{segment_} * p_.segment_tiles * kKeys;
    const int64_t end = min(first + int64_t{p_.segment_tiles} * kKeys, p_.points);
    const int64_t block = query_ - threadIdx.x;
    const int64_t block_end = block + kExactThreads * kPoints;
#pragma unroll 1
    for (int64_t key = first; key < end; key += kKeys) {
      __syncthreads();
      load_values(key);
      if constexpr (kDims > 0) {
        load_keys(key, 0);
        __syncthreads();
      }
      if (p_.self_term || key >= block_end || key + kKeys <= block) {
        add_tile<false>(key);
      } else {
        add_tile<true>(key);
      }
    }
    write();
  }

 private:
  __device__ __forceinline__ int64_t query_of(int q) const { return query_ + q * kExactThreads; }
  // Of the last point for those that do not exist; 0 in a dimension that does not.
  __device__ __forceinline__ T feature(int k, int64_t point) const {
    return k < p_.dims ? features_[k * p_.feature_strides[1] +
                                   min(point, p_.points - 1) * p_.feature_strides[2]]
                       : T{0};
  }

  __device__ __forceinline__ void load_keys(int64_t key, int dim) {
    constexpr int kGroups = kDimBlock / kVector;
#pragma unroll
    for (int item = static_cast<int>(threadIdx.x); item < kKeys * kGroups; item += kExactThreads) {
      const int j = item % kKeys;
      const int group = item / kKeys * kVector;
      Vector<T, kVector> v;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        v[e] = kDims > 0 && group + e >= kDims ? T{0} : feature(dim + group + e, key + j);
      }
      store_vector(keys_ + j * kKeyStride + group, v);
    }
  }

  // Zeros for keys and rows that are not there.
  __device__ __forceinline__ void load_values(int64_t key) {
    constexpr int kGroups = kWidth / kVector;
#pragma unroll
    for (int item = static_cast<int>(threadIdx.x); item < kKeys * kGroups; item += kExactThreads) {
      const int j = item % kKeys;
      const int group = item / kKeys * kVector;
      Vector<T, kVector> v;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        v[e] = 0;
        if (key + j < p_.points && group + e < rows_) {
          const int64_t row = row_ + group + e;
          const int64_t batch = image_ * p_.copies + row / p_.channels;
          v[e] = p_.values[batch * p_.value_strides[0] + row % p_.channels * p_.value_strides[1] +
                           (key + j) * p_.value_strides[2]];
        }
      }
      store_vector(values_ + j * kValueStride + group, v);
    }
  }

  // kCheck: without the points themselves. Keys that do not exist are the last point again, and its
  // difference from itself may be NaN.
  template <bool kCheck>
  __device__ __forceinline__ T weight(T squares, int q, int64_t key) const {
    constexpr T kFactor = T(-0.72134752044448170368);  // -log2(e) / 2
    const T w = fast_exp2(squares * kFactor);
    return kCheck && min(key, p_.points - 1) == query_of(q) ? T{0} : w;
  }

  template <bool kCheck>
  __device__ __forceinline__ void add_tile(int64_t key) {
    T run[kPoints][kWidth] = {};
    if constexpr (kDims > 0) {
#pragma unroll 2
      for (int j = 0; j < kKeys; ++j) {
        T at[kDimBlock];
#pragma unroll
        for (int k = 0; k < kDimBlock; k += kVector) {
          const auto v = load_vector<kVector>(keys_ + j * kKeyStride + k);
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            at[k + e] = v[e];
          }
        }
        T w[kPoints];
#pragma unroll
        for (int q = 0; q < kPoints; ++q) {
          T squares = 0;
#pragma unroll
          for (int k = 0; k < kDims; ++k) {
            const T difference = at[k] - own_[q][k];
            squares = fma(difference, difference, squares);
          }
          w[q] = weight<kCheck>(squares, q, key + j);
        }
        add_key(j, w, run);
      }
    } else {
      T squares[kPoints][kKeys] = {};
#pragma unroll 1
      for (int dim = 0; dim < p_.dims; dim += kDimBlock) {
        __syncthreads();
        load_keys(key, dim);
        __syncthreads();
        add_squares(dim, squares);
      }
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        T w[kPoints];
#pragma unroll
        for (int q = 0; q < kPoints; ++q) {
          w[q] = weight<kCheck>(squares[q][j], q, key + j);
        }
        add_key(j, w, run);
      }
    }
#pragma unroll
    for (int q = 0; q < kPoints; ++q) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        sums_[q][c] += run[q][c];
      }
    }
  }

  __device__ __forceinline__ void add_squares(int dim, T (&squares)[kPoints][kKeys]) const {
#pragma unroll
    for (int k = 0; k < kDimBlock; ++k) {
      T own[kPoints];
#pragma unroll
      for (int q = 0; q < kPoints; ++q) {
        own[q] = feature(dim + k, query_of(q));
      }
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const T at = keys_[j * kKeyStride + k];
#pragma unroll
        for (int q = 0; q < kPoints; ++q) {
          const T difference = at - own[q];
          squares[q][j] = fma(difference, difference, squares[q][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_key(int j, const T (&w)[kPoints],
                                          T (&run)[kPoints][kWidth]) const {
#pragma unroll
    for (int c = 0; c < kWidth; c += kVector) {
      const auto v = load_vector<kVector>(values_ + j * kValueStride + c);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
#pragma unroll
        for (int q = 0; q < kPoints; ++q) {
          run[q][c + e] = fma(w[q], v[e], run[q][c + e]);
        }
      }
    }
  }

  __device__ __forceinline__ void write() const {
    T* const out = p_.out + segment_ * p_.all + (image_ * p_.rows + row_) * p_.points;
#pragma unroll
    for (int q = 0; q < kPoints; ++q) {
      if (query_of(q) < p_.points) {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          if (c < rows_) {
            out[c * p_.points + query_of(q)] = sums_[q][c];
          }
        }
      }
    }
  }

  const ExactParams<T>& p_;
  T* keys_;    // [kKeys, kKeyStride]
  T* values_;  // [kKeys, kValueStride]
  const T* features_;
  int64_t query_;
  int64_t row_;
  int rows_;
  int32_t segment_;
  int64_t image_;
  T own_[kPoints][kDims == 0 ? 1 : kDims];
  T sums_[kPoints][kWidth] = {};
};

// Of an SM, so that registers last.
template <class T, int kDims, int kWidth>
constexpr int kExactBlocks = kDims > 0 && kWidth <= 24 && sizeof(T) == sizeof(float) ? 3 : 2;

template <class T, int kDims, int kWidth>
__global__
__launch_bounds__(kExactThreads, kExactBlocks<T, kDims, kWidth>) void exact_filter_kernel(
    const __grid_constant__ ExactParams<T> p) {
  using Filter = ExactFilter<T, kDims, kWidth>;
  __shared__ __align__(16) T shared[Filter::kShared];
  Filter(p, shared).run();
}

template <class T>
struct ExactSumParams {
  const T* parts;  // [segments, all]
  T* out;
  int64_t all;
  int32_t segments;
};

// Adds the segments, from the first to the last.
template <class T>
__global__ __launch_bounds__(kExactThreads) void exact_sum_kernel(
    const __grid_constant__ ExactSumParams<T> p) {
  const int64_t i = int64_t{blockIdx.x} * kExactThreads + threadIdx.x;
  if (i >= p.all) {
    return;
  }
  T total = p.parts[i];
#pragma unroll 4
  for (int32_t s = 1; s < p.segments; ++s) {
    total += p.parts[s * p.all + i];
  }
  p.out[i] = total;
}

}  // namespace pydense
