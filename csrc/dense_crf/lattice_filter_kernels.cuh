// SPDX-License-Identifier: Apache-2.0
// Splatting and blurring: rows of channels for points and vertices, moved 16 bytes at a time.
// threadIdx.x lies along a row, threadIdx.y along the rows of a block. No atomics: a vertex's
// corners lie next to each other, chunks of 64 are summed in order, and so are a vertex's chunks.
#pragma once

#include "common/cuda.cuh"
#include "dense_crf/device_lattice.h"

namespace pydense {

constexpr int kRowThreads = 128;  // of a block, at most
constexpr int kLongThreads = 256;
static_assert(kVertexUnit % kLongThreads == 0);

template <class T>
constexpr int kRowVector = 16 / static_cast<int>(sizeof(T));
template <class T>
using RowVector = Vector<T, kRowVector<T>>;

template <class T>
__device__ __forceinline__ RowVector<T> row_zero() {
  RowVector<T> v;
#pragma unroll
  for (int i = 0; i < kRowVector<T>; ++i) {
    v[i] = T{};
  }
  return v;
}

// sum + factor * v.
template <class T>
__device__ __forceinline__ void add_scaled(RowVector<T>& sum, T factor, const RowVector<T>& v) {
#pragma unroll
  for (int i = 0; i < kRowVector<T>; ++i) {
    sum[i] = fma(v[i], factor, sum[i]);
  }
}

template <class T>
struct SplatParams {
  const int64_t* counts;
  const int32_t* chunks;
  const int32_t* chunk_starts;
  const int32_t* entry_points;
  const T* entry_weights;
  const T* norm;    // [all points], or null for 1
  const T* values;  // [copies, all points, width], or null for 1
  int64_t all_points;
  int64_t capacity;
  int64_t chunk_capacity;
  int copies;   // of the lattice's images, that it is used for
  int vectors;  // of a row
  T* rows;      // [copies, capacity, width]
  T* parts;     // [copies, chunk_capacity, width] of vertices with several chunks
};

// kValues: there are some; else all are 1.
template <class T, bool kValues>
__global__ void __launch_bounds__(kRowThreads) lattice_splat_kernel(const SplatParams<T> p) {
  const int64_t chunk = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (chunk >= p.counts[1]) {
    return;
  }
  const Vector<int32_t, 2> own = load_vector<2>(p.chunks + 2 * chunk);
  const int32_t end = p.chunks[2 * chunk + 2];
  const int64_t width = int64_t{p.vectors} * kRowVector<T>;
  for (int64_t copy = blockIdx.y; copy < p.copies; copy += gridDim.y) {
    T* const to = own[1] >= 0 ? p.rows + (copy * p.capacity + own[1]) * width
                              : p.parts + (copy * p.chunk_capacity + chunk) * width;
    const T* const values = p.values + (kValues ? copy * p.all_points * width : 0);
    for (int v = static_cast<int>(threadIdx.x); v < p.vectors; v += static_cast<int>(blockDim.x)) {
      RowVector<T> sum = row_zero<T>();
#pragma unroll 2
      for (int32_t i = own[0]; i < end; ++i) {
        [[maybe_unused]] const int64_t point = p.entry_points[i];
        const T weight = p.entry_weights[i];
        if constexpr (kValues) {
          RowVector<T> value =
              load_vector<kRowVector<T>>(values + point * width + v * kRowVector<T>);
          if (p.norm != nullptr) {
            const T norm = p.norm[point];
#pragma unroll
            for (int k = 0; k < kRowVector<T>; ++k) {
              value[k] *= norm;
            }
          }
          add_scaled(sum, weight, value);
        } else {
#pragma unroll
          for (int k = 0; k < kRowVector<T>; ++k) {
            sum[k] += weight;
          }
        }
      }
      store_vector(to + v * kRowVector<T>, sum);
    }
  }
}

// Adds the chunks of vertices that have several. A block looks through as many vertices as it has
// threads, and all of its threads add up one after the other.
template <class T>
__global__ void __launch_bounds__(kLongThreads) lattice_splat_long_kernel(const SplatParams<T> p) {
  __shared__ unsigned several[kLongThreads / 32];
  __shared__ T sums[kLongThreads * kRowVector<T>];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = int64_t{blockIdx.x} * kLongThreads;
  const int32_t count = p.chunk_starts[first + thread + 1] - p.chunk_starts[first + thread];
  const unsigned mask = __ballot_sync(0xFFFFFFFFU, count > 1);
  if (thread % 32 == 0) {
    several[thread / 32] = mask;
  }
  __syncthreads();
  const int64_t width = int64_t{p.vectors} * kRowVector<T>;
  const int lanes = min(p.vectors, 64);  // along the row
  const int slices = kLongThreads / lanes;
  const int lane = thread % lanes;
  const int slice = thread / lanes;
  for (int warp = 0; warp < kLongThreads / 32; ++warp) {
    for (unsigned left = several[warp]; left != 0; left &= left - 1) {
      const int64_t vertex = first + warp * 32 + __ffs(static_cast<int>(left)) - 1;
      const int32_t begin = p.chunk_starts[vertex];
      const int32_t end = p.chunk_starts[vertex + 1];
      for (int64_t copy = blockIdx.y; copy < p.copies; copy += gridDim.y) {
        const T* const parts = p.parts + copy * p.chunk_capacity * width;
        for (int base = 0; base < p.vectors; base += lanes) {
          const int v = base + lane;
          const bool active = slice < slices && v < p.vectors;
          RowVector<T> sum = row_zero<T>();
          for (int32_t c = begin + slice; active && c < end; c += slices) {
            add_scaled(sum, T{1},
                       load_vector<kRowVector<T>>(parts + c * width + v * kRowVector<T>));
          }
          store_vector(sums + thread * kRowVector<T>, sum);
          __syncthreads();
          if (active && slice == 0) {
            for (int other = 1; other < slices && other < end - begin; ++other) {
              add_scaled(sum, T{1},
                         load_vector<kRowVector<T>>(sums + (other * lanes + lane) * kRowVector<T>));
            }
            store_global_vector(p.rows + (copy * p.capacity + vertex) * width + v * kRowVector<T>,
                                sum);
          }
          __syncthreads();
        }
      }
    }
  }
}

template <class T>
struct BlurParams {
  const int64_t* counts;
  const int32_t* neighbours;  // [capacity, 2] along the axis
  int64_t capacity;
  int copies;
  int vectors;
  const T* rows;
  T* blurred;
};

// row + (row before + row behind) / 2; one that is not there is 0.
template <class T>
__global__ void __launch_bounds__(kRowThreads) lattice_blur_kernel(const BlurParams<T> p) {
  const int64_t vertex = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (vertex >= p.counts[0]) {
    return;
  }
  const Vector<int32_t, 2> sides = load_vector<2>(p.neighbours + 2 * vertex);
  const int64_t width = int64_t{p.vectors} * kRowVector<T>;
  for (int64_t copy = blockIdx.y; copy < p.copies; copy += gridDim.y) {
    const T* const rows = p.rows + copy * p.capacity * width;
    for (int v = static_cast<int>(threadIdx.x); v < p.vectors; v += static_cast<int>(blockDim.x)) {
      const int64_t at = int64_t{v} * kRowVector<T>;
      RowVector<T> own = load_vector<kRowVector<T>>(rows + vertex * width + at);
      RowVector<T> around = row_zero<T>();
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (sides[side] >= 0) {
          add_scaled(around, T{1}, load_vector<kRowVector<T>>(rows + sides[side] * width + at));
        }
      }
      add_scaled(own, static_cast<T>(0.5), around);
      store_global_vector(p.blurred + copy * p.capacity * width + vertex * width + at, own);
    }
  }
}

// Between arrays [batch, channels, points] of any strides and rows [batch, points, width].
template <class T>
struct RowsParams {
  T* array;  // only read where it is the source
  int64_t strides[3];
  T* rows;
  int64_t points;
  int64_t point_tiles;
  int64_t channels;
  int64_t width;
  T factor;   // for what is loaded or stored
  T padding;  // behind the channels, of what is loaded
};

constexpr int kRowsTile = 32;
constexpr int kRowsThreads = 8;  // in y

// Whether threads lie along the channels of the array.
template <class T>
__device__ __forceinline__ bool along_channels(const RowsParams<T>& p) {
  return p.strides[1] == 1 && p.strides[2] != 1;
}

template <class T>
__global__ void __launch_bounds__(kRowsTile* kRowsThreads) rows_load_kernel(const RowsParams<T> p) {
  __shared__ T tile[kRowsTile][kRowsTile + 1];  // [point][channel]
  const int64_t image = blockIdx.x / p.point_tiles;
  const int64_t first = blockIdx.x % p.point_tiles * kRowsTile;
  const int64_t channel = int64_t{blockIdx.y} * kRowsTile;
  const int x = static_cast<int>(threadIdx.x);
  const bool along = along_channels(p);
  for (int y = static_cast<int>(threadIdx.y); y < kRowsTile; y += kRowsThreads) {
    const int point = along ? y : x;
    const int c = along ? x : y;
    if (first + point < p.points) {
      tile[point][c] =
          channel + c < p.channels
              ? p.factor * p.array[image * p.strides[0] + (channel + c) * p.strides[1] +
                                   (first + point) * p.strides[2]]
              : p.padding;
    }
  }
  __syncthreads();
  T* const to = p.rows + (image * p.points + first) * p.width + channel;
  for (int y = static_cast<int>(threadIdx.y); y < kRowsTile; y += kRowsThreads) {
    if (first + y < p.points && channel + x < p.width) {
      to[y * p.width + x] = tile[y][x];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kRowsTile* kRowsThreads)
    rows_store_kernel(const RowsParams<T> p) {
  __shared__ T tile[kRowsTile][kRowsTile + 1];  // [point][channel]
  const int64_t image = blockIdx.x / p.point_tiles;
  const int64_t first = blockIdx.x % p.point_tiles * kRowsTile;
  const int64_t channel = int64_t{blockIdx.y} * kRowsTile;
  const int x = static_cast<int>(threadIdx.x);
  const T* const from = p.rows + (image * p.points + first) * p.width + channel;
  for (int y = static_cast<int>(threadIdx.y); y < kRowsTile; y += kRowsThreads) {
    if (first + y < p.points && channel + x < p.channels) {
      tile[y][x] = from[y * p.width + x];
    }
  }
  __syncthreads();
  const bool along = along_channels(p);
  for (int y = static_cast<int>(threadIdx.y); y < kRowsTile; y += kRowsThreads) {
    const int point = along ? y : x;
    const int c = along ? x : y;
    if (first + point < p.points && channel + c < p.channels) {
      p.array[image * p.strides[0] + (channel + c) * p.strides[1] +
              (first + point) * p.strides[2]] = p.factor * tile[point][c];
    }
  }
}

}  // namespace pydense
