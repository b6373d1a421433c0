// SPDX-License-Identifier: Apache-2.0
// What the kernels of a stage of chained residual pooling share: which pixels and channels a block
// has, and what is added to its sums on their way out. A block has a rectangle of pixels, so that
// the windows of the pool overlap within it.
#pragma once

#include "chained_residual_pool/residual_stage.h"
#include "common/cuda.cuh"

namespace pydense {

constexpr int kResidualColumns = 16;  // pixels of a tile, side by side

template <class T>
struct ResidualStageParams {
  const T* x;  // dense pictures
  int32_t height;
  int32_t width;
  int32_t depth;    // channels, of x and of the result
  const T* weight;  // [depth, depth], output by input
  const T* bias;    // [depth], or null
  T* out;
  T* pooled;               // as out, or null
  uint8_t* offsets;        // as out, or null
  uint32_t channel_tiles;  // blocks side by side in the grid share pixels
  uint32_t tiles_across;
  uint32_t tiles_down;
  int32_t tile_channels;
  bool x_vectors;  // 16 bytes at a time
  bool weight_vectors;
  bool result_vectors;
  int32_t num_addends;
  const T* addends[kMaxResidualStages];  // as out
};

// The pixels and channels of a block. Pixels of a tile are counted row by row.
template <bool kChannelsLast>
struct ResidualTile {
  int32_t image;
  int32_t y;  // of the first pixel
  int32_t x;
  int32_t channel;  // the first one of the result

  template <class T>
  __device__ __forceinline__ ResidualTile(const ResidualStageParams<T>& p, int rows) {
    channel = static_cast<int32_t>(blockIdx.x % p.channel_tiles) * p.tile_channels;
    uint32_t tile = blockIdx.x / p.channel_tiles;
    x = static_cast<int32_t>(tile % p.tiles_across) * kResidualColumns;
    tile /= p.tiles_across;
    y = static_cast<int32_t>(tile % p.tiles_down) * rows;
    image = static_cast<int32_t>(tile / p.tiles_down);
  }

  // Where an element of a picture is; the row and the column are those of the picture.
  template <class T>
  __device__ __forceinline__ int64_t at(const ResidualStageParams<T>& p, int32_t c, int32_t row,
                                        int32_t column) const {
    return kChannelsLast ? ((int64_t{image} * p.height + row) * p.width + column) * p.depth + c
                         : ((int64_t{image} * p.depth + c) * p.height + row) * p.width + column;
  }
};

// How many neighbours are finished at a time.
template <class T>
constexpr int kResidualVector = 16 / static_cast<int>(sizeof(T));

// out = addends[0] + addends[1] + ... + (sum + bias), in the order of the CPU's, for neighbours in
// memory that begin at a pixel of the tile and a channel of the picture.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void finish_residual(const ResidualStageParams<T>& p,
                                                const ResidualTile<kChannelsLast>& tile, int pixel,
                                                int32_t channel,
                                                const Accumulate<T> (&sum)[kResidualVector<T>]) {
  using A = Accumulate<T>;
  constexpr int kVector = kResidualVector<T>;
  const int32_t y = tile.y + pixel / kResidualColumns;
  const int32_t x = tile.x + pixel % kResidualColumns;
  if (y >= p.height || x >= p.width || channel >= p.depth) {
    return;
  }
  const int64_t at = tile.at(p, channel, y, x);
  const T* const bias = p.bias == nullptr ? nullptr : p.bias + channel;
  if (p.result_vectors) {
    A total[kVector];
#pragma unroll 2
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
      const A own = bias == nullptr ? sum[e] : sum[e] + to_accumulate(bias[kChannelsLast ? e : 0]);
      result[e] = from_accumulate<T>(p.num_addends > 0 ? total[e] + own : own);
    }
    store_global_vector(p.out + at, result);
    return;
  }
  A left[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    left[e] = sum[e];
  }
  const int inside = min(kVector, kChannelsLast ? p.depth - channel : p.width - x);
#pragma unroll 1
  for (int e = 0; e < inside; ++e) {
    const A own = bias == nullptr ? left[0] : left[0] + to_accumulate(bias[kChannelsLast ? e : 0]);
    A total{};
#pragma unroll 1
    for (int k = 0; k < p.num_addends; ++k) {
      const A addend = to_accumulate(p.addends[k][at + e]);
      total = k == 0 ? addend : total + addend;
    }
    p.out[at + e] = from_accumulate<T>(p.num_addends > 0 ? total + own : own);
#pragma unroll
    for (int i = 1; i < kVector; ++i) {  // the next one: registers have no index
      left[i - 1] = left[i];
    }
  }
}

}  // namespace pydense
