// SPDX-License-Identifier: Apache-2.0
// Products of rows of labels with a compatibility, and sums over the points of products of two
// rows: its derivative. A block sums up a chunk of points; chunks are added up in their order.
#pragma once

#include "common/cuda.cuh"
#include "dense_crf/device_lattice.h"
#include "dense_crf/lattice_filter_kernels.cuh"

namespace pydense {

constexpr int kTileVectors = 8;  // of a tile of labels
template <class T>
constexpr int kLabelTile = kTileVectors * kRowVector<T>;
// Rows of tiles in shared memory: without a vector more, their starts would share banks.
template <class T>
constexpr int kTileStride = kLabelTile<T> + kRowVector<T>;

constexpr int kProductThreads = 128;
constexpr int kProductRows = kProductThreads / kTileVectors;
constexpr int kProductEach = 4;  // points of a thread
constexpr int kProductPoints = kProductRows * kProductEach;

template <class T>
struct LabelProductParams {
  const T* in;      // [points, width]
  const T* matrix;  // [labels, labels]
  bool transposed;
  const T* base;  // [points, width] what is added to, may be out, or null for 0
  T* out;         // [points, width]
  int64_t points;
  int64_t labels;
  int vectors;
};

// Vector `vector` of a row; 0 for labels that are none.
template <class T>
__device__ __forceinline__ RowVector<T> load_labels(const T* row, int64_t vector, int64_t labels) {
  const int64_t at = vector * kRowVector<T>;
  if (at >= labels) {
    return row_zero<T>();
  }
  RowVector<T> v = load_vector<kRowVector<T>>(row + at);
#pragma unroll
  for (int k = 1; k < kRowVector<T>; ++k) {
    v[k] = at + k < labels ? v[k] : T{};
  }
  return v;
}

// out = base + M in for every point, or M^T in where it is transposed. A thread has a vector of
// labels of every kProductRows-th point.
template <class T>
__global__ void __launch_bounds__(kProductThreads)
    label_product_kernel(const LabelProductParams<T> p) {
  constexpr int kVector = kRowVector<T>;
  constexpr int kTile = kLabelTile<T>;
  constexpr int kStride = kTileStride<T>;
  __shared__ __align__(16) T rows[kProductPoints * kStride];
  __shared__ __align__(16) T factors[kTile * kStride];  // [label summed over][label of the result]
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kTileVectors;
  const int row = thread / kTileVectors;
  const int64_t first = int64_t{blockIdx.x} * kProductPoints;
  const int64_t vector = int64_t{blockIdx.y} * kTileVectors + column;
  const int64_t label = int64_t{blockIdx.y} * kTile;
  const int64_t width = int64_t{p.vectors} * kVector;
  RowVector<T> sums[kProductEach];
#pragma unroll
  for (int i = 0; i < kProductEach; ++i) {
    const int64_t point = first + row + i * kProductRows;
    const bool add = p.base != nullptr && point < p.points && vector < p.vectors;
    sums[i] = add ? load_vector<kVector>(p.base + point * width + vector * kVector) : row_zero<T>();
  }
  for (int64_t from = 0; from < p.labels; from += kTile) {
#pragma unroll
    for (int i = 0; i < kProductEach; ++i) {
      const int y = row + i * kProductRows;
      const RowVector<T> v = first + y < p.points ? load_labels(p.in + (first + y) * width,
                                                                from / kVector + column, p.labels)
                                                  : row_zero<T>();
      store_vector(rows + y * kStride + column * kVector, v);
    }
    for (int i = thread; i < kTile * kTile; i += kProductThreads) {
      const int outer = i / kTile;  // a row of the matrix
      const int inner = i % kTile;
      const int summed = p.transposed ? outer : inner;
      const int own = p.transposed ? inner : outer;
      const bool inside = from + summed < p.labels && label + own < p.labels;
      const int64_t at = p.transposed ? (from + summed) * p.labels + label + own
                                      : (label + own) * p.labels + from + summed;
      factors[summed * kStride + own] = inside ? p.matrix[at] : T{};
    }
    __syncthreads();
#pragma unroll 2
    for (int m = 0; m < kTile; m += kVector) {
      RowVector<T> theirs[kProductEach];
#pragma unroll
      for (int i = 0; i < kProductEach; ++i) {
        theirs[i] = load_vector<kVector>(rows + (row + i * kProductRows) * kStride + m);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const RowVector<T> factor =
            load_vector<kVector>(factors + (m + k) * kStride + column * kVector);
#pragma unroll
        for (int i = 0; i < kProductEach; ++i) {
          add_scaled(sums[i], theirs[i][k], factor);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kProductEach; ++i) {
    const int64_t point = first + row + i * kProductRows;
    if (point < p.points && vector < p.vectors) {
      store_global_vector(p.out + point * width + vector * kVector, sums[i]);
    }
  }
}

// Sums over points of products of two rows.
template <class T>
struct LabelSumParams {
  const T* one;    // [points, width]
  const T* other;  // [points, width]
  int64_t points;
  int64_t chunk;  // points of a block
  int64_t labels;
  int vectors;
  bool first;    // nothing is in the sums yet
  double* sums;  // [chunks, values]
};

constexpr int kOuterThreads = kTileVectors * kTileVectors;
constexpr int kOuterPoints = 32;  // in shared memory
constexpr int kOuterRound = 128;  // points summed in T before they are added in double

// All products of two labels, a tile of labels by a tile of labels.
template <class T>
__global__ void __launch_bounds__(kOuterThreads) label_outer_kernel(const LabelSumParams<T> p) {
  constexpr int kVector = kRowVector<T>;
  constexpr int kStride = kTileStride<T>;
  __shared__ __align__(16) T ones[kOuterPoints * kStride];
  __shared__ __align__(16) T others[kOuterPoints * kStride];
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kTileVectors;
  const int row = thread / kTileVectors;
  const int64_t width = int64_t{p.vectors} * kVector;
  const int64_t begin = int64_t{blockIdx.x} * p.chunk;
  const int64_t end = begin + p.chunk < p.points ? begin + p.chunk : p.points;
  double totals[kVector][kVector] = {};
  for (int64_t round = begin; round < end; round += kOuterRound) {
    T sums[kVector][kVector] = {};
    for (int64_t from = round; from < round + kOuterRound && from < end; from += kOuterPoints) {
      for (int y = row; y < kOuterPoints; y += kTileVectors) {
        const bool inside = from + y < end;
        const int64_t at = (from + y) * width;
        const int to = y * kStride + column * kVector;
        const int64_t one = int64_t{blockIdx.y} * kTileVectors + column;
        const int64_t other = int64_t{blockIdx.z} * kTileVectors + column;
        store_vector(ones + to, inside ? load_labels(p.one + at, one, p.labels) : row_zero<T>());
        store_vector(others + to,
                     inside ? load_labels(p.other + at, other, p.labels) : row_zero<T>());
      }
      __syncthreads();
#pragma unroll 4
      for (int y = 0; y < kOuterPoints; ++y) {
        const RowVector<T> a = load_vector<kVector>(ones + y * kStride + row * kVector);
        const RowVector<T> b = load_vector<kVector>(others + y * kStride + column * kVector);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            sums[i][j] = fma(a[i], b[j], sums[i][j]);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        totals[i][j] += static_cast<double>(sums[i][j]);
      }
    }
  }
  double* const to = p.sums + int64_t{blockIdx.x} * p.labels * p.labels;
  const int64_t label = (int64_t{blockIdx.y} * kTileVectors + row) * kVector;
  const int64_t other = (int64_t{blockIdx.z} * kTileVectors + column) * kVector;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (label + i < p.labels && other + j < p.labels) {
        double& sum = to[(label + i) * p.labels + other + j];
        sum = p.first ? totals[i][j] : sum + totals[i][j];
      }
    }
  }
}

template <class T>
struct LabelScaleParams {
  LabelSumParams<T> sums;  // values: 1 or, for a diagonal, of every label
  const T* compat;
  bool diagonal;
  const T* base;  // [points, width], may be out, or null for 0
  T* out;         // [points, width] base + compat one
};

constexpr int kScaleThreads = 128;

// The same for one value or a diagonal: both the product and the sums in one pass.
template <class T>
__global__ void __launch_bounds__(kScaleThreads) label_scale_kernel(const LabelScaleParams<T> p) {
  constexpr int kVector = kRowVector<T>;
  __shared__ double parts[kScaleThreads * kVector];
  const LabelSumParams<T>& s = p.sums;
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = min(s.vectors, kScaleThreads);  // along the row
  const int slices = kScaleThreads / lanes;
  const int lane = thread % lanes;
  const int slice = thread / lanes;
  const int64_t width = int64_t{s.vectors} * kVector;
  const int64_t begin = int64_t{blockIdx.x} * s.chunk;
  const int64_t end = begin + s.chunk < s.points ? begin + s.chunk : s.points;
  double potts = 0;
  for (int base = 0; base < s.vectors; base += lanes) {
    const int64_t at = int64_t{base + lane} * kVector;
    const bool active = slice < slices && base + lane < s.vectors;
    RowVector<T> factor = row_zero<T>();
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (active && at + k < s.labels) {
        factor[k] = p.compat[p.diagonal ? at + k : 0];
      }
    }
    double totals[kVector] = {};
    for (int64_t point = begin + slice; active && point < end; point += slices) {
      const RowVector<T> one = load_vector<kVector>(s.one + point * width + at);
      const RowVector<T> other = load_vector<kVector>(s.other + point * width + at);
      RowVector<T> sum =
          p.base == nullptr ? row_zero<T>() : load_vector<kVector>(p.base + point * width + at);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        sum[k] = fma(one[k], factor[k], sum[k]);
        if (at + k < s.labels) {
          totals[k] = fma(static_cast<double>(one[k]), static_cast<double>(other[k]), totals[k]);
        }
      }
      store_global_vector(p.out + point * width + at, sum);
    }
    if (!p.diagonal) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        potts += totals[k];
      }
      continue;
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      parts[k * kScaleThreads + thread] = totals[k];
    }
    __syncthreads();
    for (int k = 0; active && slice == 0 && k < kVector; ++k) {
      double sum = 0;
      for (int other = 0; other < slices; ++other) {
        sum += parts[k * kScaleThreads + other * lanes + lane];
      }
      if (at + k < s.labels) {
        double& to = s.sums[int64_t{blockIdx.x} * s.labels + at + k];
        to = s.first ? sum : to + sum;
      }
    }
    __syncthreads();
  }
  if (p.diagonal) {
    return;
  }
  parts[thread] = potts;
  for (int half = kScaleThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      parts[thread] += parts[thread + half];
    }
  }
  if (thread == 0) {
    double& to = s.sums[blockIdx.x];
    to = s.first ? parts[0] : to + parts[0];
  }
}

template <class T>
struct ChunkSumParams {
  const double* sums;  // [chunks, values]
  int64_t chunks;
  int64_t values;
  T* out;  // [values]
};

constexpr int kChunkSumValues = 32;  // of a block
constexpr int kChunkSumSlices = 8;

template <class T>
__global__ void __launch_bounds__(kChunkSumValues* kChunkSumSlices)
    label_chunk_sum_kernel(const ChunkSumParams<T> p) {
  __shared__ double parts[kChunkSumSlices][kChunkSumValues];
  const int x = static_cast<int>(threadIdx.x);
  const int y = static_cast<int>(threadIdx.y);
  const int64_t value = int64_t{blockIdx.x} * kChunkSumValues + x;
  double sum = 0;
  for (int64_t c = y; value < p.values && c < p.chunks; c += kChunkSumSlices) {
    sum += p.sums[c * p.values + value];
  }
  parts[y][x] = sum;
  __syncthreads();
  if (y == 0 && value < p.values) {
    for (int other = 1; other < kChunkSumSlices; ++other) {
      sum += parts[other][x];
    }
    p.out[value] = static_cast<T>(sum);
  }
}

}  // namespace pydense
