// SPDX-License-Identifier: Apache-2.0
// The matrix product of a stage of chained residual pooling, and what is added to it on its way
// out. With contiguous pictures it is weight [C, C] times an image [C, pixels], else pixels [P, C]
// times the transposed weight: rows of results are contiguous in both, and every operand is read as
// it lies in memory.
#pragma once

#include "chained_residual_pool/residual_stage.h"
#include "common/cuda.cuh"

namespace pydense {

template <class T>
struct ResidualProductParams {
  const T* left;   // [rows, depth], the same for all images
  const T* right;  // [images, depth, columns], or for channels_last [columns, depth]
  const T* bias;   // [C], or null
  T* out;          // [images, rows, columns]
  int64_t rows;
  int64_t columns;
  int32_t depth;
  int64_t column_tiles;
  uint32_t channel_tiles;  // blocks side by side in the grid share what is larger than the weight
  bool operand_vectors;    // 16 bytes at a time
  bool result_vectors;
  int32_t num_addends;
  const T* addends[kMaxResidualStages];  // as out
};

// Which tile of the product a block makes.
template <bool kChannelsLast>
struct ResidualTile {
  int64_t image;
  int64_t row;
  int64_t column;

  template <class T>
  __device__ __forceinline__ ResidualTile(const ResidualProductParams<T>& p, int tile_rows,
                                          int tile_columns) {
    const int64_t channel_tile = blockIdx.x % p.channel_tiles;
    const int64_t tile = blockIdx.x / p.channel_tiles;
    image = kChannelsLast ? 0 : tile / p.column_tiles;
    row = (kChannelsLast ? tile : channel_tile) * tile_rows;
    column = (kChannelsLast ? channel_tile : tile - image * p.column_tiles) * tile_columns;
  }
};

// How many neighbours are finished at a time.
template <class T>
constexpr int kResidualVector = 16 / static_cast<int>(sizeof(T));

// out = addends[0] + addends[1] + ... + (sum + bias), in the order of the CPU's.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void finish_residual(const ResidualProductParams<T>& p, int64_t image,
                                                int64_t row, int64_t column,
                                                const Accumulate<T> (&sum)[kResidualVector<T>]) {
  using A = Accumulate<T>;
  constexpr int kVector = kResidualVector<T>;
  if (row >= p.rows || column >= p.columns) {
    return;
  }
  A own[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    own[e] = sum[e];
    if (p.bias != nullptr && column + e < p.columns) {
      own[e] += to_accumulate(p.bias[kChannelsLast ? column + e : row]);
    }
  }
  const int64_t at = (image * p.rows + row) * p.columns + column;
  A total[kVector] = {};
  if (p.result_vectors) {
    for (int k = 0; k < p.num_addends; ++k) {
      const auto addend = load_vector<kVector>(p.addends[k] + at);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        total[e] = k == 0 ? to_accumulate(addend[e]) : total[e] + to_accumulate(addend[e]);
      }
    }
    Vector<T, kVector> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      result[e] = from_accumulate<T>(p.num_addends > 0 ? total[e] + own[e] : own[e]);
    }
    store_vector(p.out + at, result);
    return;
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    if (column + e < p.columns) {
      for (int k = 0; k < p.num_addends; ++k) {
        const A addend = to_accumulate(p.addends[k][at + e]);
        total[e] = k == 0 ? addend : total[e] + addend;
      }
      p.out[at + e] = from_accumulate<T>(p.num_addends > 0 ? total[e] + own[e] : own[e]);
    }
  }
}

}  // namespace pydense
