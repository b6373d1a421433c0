// SPDX-License-Identifier: Apache-2.0
// What the kernels of dense convolutions share: their parameters, which pixels and taps a block
// has, and how results leave.
#pragma once

#include "atrous_conv/dense_tiles.h"
#include "atrous_conv/phase_tiles.h"
#include "common/cuda.cuh"

namespace pydense {

// Elements of 16 bytes: what is brought, and multiplied, together.
template <class T>
constexpr int kDenseVector = 16 / static_cast<int>(sizeof(T));
// Channels of a step.
template <class T>
constexpr int kDenseDepth = 4 * kDenseVector<T>;

// Strides are in elements.
template <class T>
struct DenseBranch {
  const T* weight;  // channels side by side
  int64_t weight_output;
  int64_t weight_tap;
  const float* scale;  // [outputs], or null
  const float* bias;   // [outputs], or null
  T* out;
  int64_t out_batch;
  int64_t out_channel;
  int64_t out_row;
  int64_t out_pixel;
  int32_t outputs;
  uint32_t column_tiles;
  int32_t kernel_width;
  int32_t dilation_y;
  int32_t dilation_x;
  int32_t top;
  int32_t left;
  bool out_vectors;  // 16 bytes at a time
  bool relu;
};

template <class T>
struct DenseMmaParams {
  const T* x;  // channels side by side, every pixel at a multiple of 16 bytes
  int64_t x_batch;
  int64_t x_row;
  int64_t x_pixel;
  int32_t channels;  // a multiple of kDenseVector
  int32_t chunks;    // steps of a tap
  int32_t num_classes;
  int32_t tile_columns;
  float* parts;  // [parts, kDenseRows, tile_columns]: sums of splits
  DenseBranch<T> branches[kMaxDenseBranches];
  DenseClass classes[kMaxDenseClasses];
};

// The last class whose first block, as `first` reads it, is at most `block`.
template <class T, class First>
__device__ __forceinline__ int dense_class_of(const DenseMmaParams<T>& p, uint32_t block,
                                              const First& first) {
  int low = 0;
  int high = p.num_classes - 1;
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first(p.classes[middle]) <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct DensePixel {
  uint32_t image;
  int32_t y;
  int32_t x;

  __device__ __forceinline__ DensePixel(const DenseClass& own, uint32_t pixel) {
    const auto width = static_cast<uint32_t>(own.width);
    const uint32_t row = pixel / width;
    const auto height = static_cast<uint32_t>(own.height);
    image = row / height;
    const uint32_t in_image = row - image * height;
    y = own.y +
        static_cast<int32_t>(own.rate == 1 ? in_image : phase_order_at(in_image, height, own.rate));
    x = own.x + static_cast<int32_t>(pixel - row * width);
  }
};

template <class T>
__device__ __forceinline__ int64_t dense_out_at(const DenseBranch<T>& branch, const DenseClass& own,
                                                uint32_t pixel) {
  const DensePixel at(own, pixel);
  return at.image * branch.out_batch + at.y * branch.out_row + at.x * branch.out_pixel;
}

// f(scale * sum + bias) of some outputs; those beyond the last are 0.
struct DenseFactors {
  float scale = 0;
  float bias = 0;

  DenseFactors() = default;
  template <class T>
  __device__ __forceinline__ DenseFactors(const DenseBranch<T>& branch, int32_t output) {
    const bool own = output < branch.outputs;
    scale = !own ? 0 : branch.scale == nullptr ? 1 : branch.scale[output];
    bias = own && branch.bias != nullptr ? branch.bias[output] : 0;
  }
  __device__ __forceinline__ float operator()(float sum, bool relu) const {
    const float shifted = fmaf(scale, sum, bias);
    return relu && shifted < 0 ? 0 : shifted;
  }
};

// A warp's sums of a split, 32 columns of kPitch, as they lie over its lanes; `to` is the block's
// row 0 in the warp's first column, `first_row` the first of the warp.
template <int kPitch, int kGroups>
__device__ __forceinline__ void store_part(float* to, const float (&sums)[kGroups][4][4], int lane,
                                           int first_row, int rows) {
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + i * kDenseGroup + 8 * half + lane / 4;
      if (row < rows) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Vector<float, 2> pair;
          pair[0] = sums[i][j][2 * half];
          pair[1] = sums[i][j][2 * half + 1];
          store_vector(to + row * kPitch + lane % 4 * 2 + 8 * j, pair);
        }
      }
    }
  }
}

// kRows pixels of kDenseColumns outputs in shared memory, in the order in which they leave: pixel
// by pixel where outputs lie side by side in memory, else output by output.
template <class T>
struct DenseStage {
  static constexpr int kRows = 64;
  static constexpr int kOutputPitch = kRows + kDenseVector<T>;
  static constexpr int kElements = kDenseColumns * kOutputPitch;

  T* data;
  bool by_pixel;

  // Vectors of a pixel change places, so that those of neighbours lie in all banks.
  __device__ __forceinline__ static int place(int row, int column) {
    constexpr int kVector = kDenseVector<T>;
    const int swap = sizeof(T) == 4 ? row % 4 * 2 : row / 2 % 4;
    return row * kDenseColumns + (column / kVector ^ swap) * kVector + column % kVector;
  }

  // Neighbours, as many as divide a vector.
  template <int kCount>
  __device__ __forceinline__ void put(int row, int column, const float (&values)[kCount]) const {
    if (by_pixel) {
      Vector<T, kCount> vector;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        vector[e] = from_accumulate<T>(values[e]);
      }
      store_vector(data + place(row, column), vector);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        data[(column + e) * kOutputPitch + row] = from_accumulate<T>(values[e]);
      }
    }
  }

  // The first `rows` pixels, to branch.out + at[pixel], by `threads` threads of which this is one.
  __device__ __forceinline__ void leave(const DenseBranch<T>& branch, int32_t output,
                                        const int64_t* at, int rows, int thread,
                                        int threads) const {
    constexpr int kVector = kDenseVector<T>;
    const int inside = min(branch.outputs - output, kDenseColumns);
    T* const to = branch.out + output * branch.out_channel;
    if (by_pixel && branch.out_vectors) {
      constexpr int kVectors = kDenseColumns / kVector;
#pragma unroll 1
      for (int i = thread; i < rows * kVectors; i += threads) {
        const int column = i % kVectors * kVector;
        if (column < inside) {
          store_vector(to + at[i / kVectors] + column,
                       load_vector<kVector>(data + place(i / kVectors, column)));
        }
      }
    } else if (by_pixel) {
#pragma unroll 1
      for (int i = thread; i < rows * kDenseColumns; i += threads) {
        const int column = i % kDenseColumns;
        if (column < inside) {
          to[at[i / kDenseColumns] + column] = data[place(i / kDenseColumns, column)];
        }
      }
    } else {
#pragma unroll 1
      for (int i = thread; i < inside * kRows; i += threads) {
        const int row = i % kRows;
        if (row < rows) {
          to[i / kRows * branch.out_channel + at[row]] = data[i / kRows * kOutputPitch + row];
        }
      }
    }
  }
};

}  // namespace pydense
