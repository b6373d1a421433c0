// SPDX-License-Identifier: Apache-2.0
// The k-d order of points (exact_fast.h), one level of the tree after another: every node finds its
// longest side, and a sort by node and by the coordinate along that side puts the lower half of a
// node's points before the upper one. Nodes are ranges of places, so none of this is looked up:
// those of the upper levels are whole tiles, which the last levels halve.
#pragma once

#include "common/cuda.cuh"
#include "dense_crf/exact_fast.h"

namespace pydense {

constexpr int kOrderThreads = 256;
// Of a node's points so many say which side is the longest.
constexpr int64_t kOrderSample = 2048;

struct OrderLevel {
  int64_t tiles;
  int64_t padded;
  int32_t level;  // nodes 2^level
  int32_t parts;  // of a tile, at the last levels: 1, or 2 for halves; the level is then the last
  int32_t nodes;  // of an image

  // The node of a place, and its first place. The first node k with tiles k / 2^level > tile - 1.
  __device__ __forceinline__ int64_t node_of(int64_t place) const {
    const int64_t tile = place / kOrderTile;
    if (parts > 0) {
      return place / (kOrderTile / parts);
    }
    return (((tile + 1) << level) - 1) / tiles;
  }
  __device__ __forceinline__ int64_t first_of(int64_t node) const {
    return parts > 0 ? node * (kOrderTile / parts) : ((tiles * node) >> level) * kOrderTile;
  }
};

struct OrderParams {
  const float* features;
  int64_t strides[3];
  int64_t points;
  int32_t dims;
  int32_t images;
  OrderLevel level;
  const int32_t* ids;  // [images, padded], before the sort
  int32_t* sides;      // [images, nodes]
  uint64_t* keys;      // [images, padded]
};

__global__ __launch_bounds__(kOrderThreads) void order_begin_kernel(int32_t* ids, int64_t points,
                                                                    int64_t padded, int64_t all) {
  const int64_t i = int64_t{blockIdx.x} * kOrderThreads + threadIdx.x;
  if (i < all) {
    const int64_t place = i % padded;
    ids[i] = place < points ? static_cast<int32_t>(place) : -1;
  }
}

// The longest side of a node: a block each.
__global__ __launch_bounds__(kOrderThreads) void order_sides_kernel(
    const __grid_constant__ OrderParams p) {
  __shared__ float lows[kOrderThreads / 32];
  __shared__ float highs[kOrderThreads / 32];
  const int64_t image = blockIdx.x / static_cast<uint32_t>(p.level.nodes);
  const int64_t node = blockIdx.x % static_cast<uint32_t>(p.level.nodes);
  const int64_t first = p.level.first_of(node);
  const int64_t count = p.level.first_of(node + 1) - first;
  const int64_t step = (count + kOrderSample - 1) / kOrderSample;
  const int thread = static_cast<int>(threadIdx.x);
  float longest = -1;
  int32_t side = 0;
  for (int32_t k = 0; k < p.dims; ++k) {
    const float* const from = p.features + image * p.strides[0] + k * p.strides[1];
    float low = INFINITY;
    float high = -INFINITY;
    for (int64_t i = thread * step; i < count; i += kOrderThreads * step) {
      const int32_t id = p.ids[image * p.level.padded + first + i];
      if (id >= 0) {
        const float x = from[id * p.strides[2]];
        low = fminf(low, x);
        high = fmaxf(high, x);
      }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      low = fminf(low, __shfl_xor_sync(~0U, low, distance));
      high = fmaxf(high, __shfl_xor_sync(~0U, high, distance));
    }
    __syncthreads();
    if (thread % 32 == 0) {
      lows[thread / 32] = low;
      highs[thread / 32] = high;
    }
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kOrderThreads / 32; ++w) {
        low = fminf(low, lows[w]);
        high = fmaxf(high, highs[w]);
      }
      if (high - low > longest) {
        longest = high - low;
        side = k;
      }
    }
  }
  if (thread == 0) {
    p.sides[blockIdx.x] = side;
  }
}

// By node, then by the coordinate; places without a point come last.
__global__ __launch_bounds__(kOrderThreads) void order_keys_kernel(
    const __grid_constant__ OrderParams p) {
  const int64_t i = int64_t{blockIdx.x} * kOrderThreads + threadIdx.x;
  if (i >= p.images * p.level.padded) {
    return;
  }
  const int64_t image = i / p.level.padded;
  const int64_t node = image * p.level.nodes + p.level.node_of(i % p.level.padded);
  const int32_t id = p.ids[i];
  uint32_t coordinate = 0xFFFFFFFFU;
  if (id >= 0) {
    const uint32_t bits = __float_as_uint(
        p.features[image * p.strides[0] + p.sides[node] * p.strides[1] + id * p.strides[2]]);
    coordinate = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  }
  p.keys[i] = static_cast<uint64_t>(node) << 32 | coordinate;
}

struct OrderFinishParams {
  const float* features;
  int64_t strides[3];
  int64_t points;
  int32_t dims;
  PointOrder order;
};

// What the filter reads, in order; a warp for every 64 points. Where there is no point, the last
// one of the 64 stands, or zeros.
__global__ __launch_bounds__(kOrderThreads) void order_finish_kernel(
    const __grid_constant__ OrderFinishParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t block = (int64_t{blockIdx.x} * kOrderThreads + threadIdx.x) / 32;
  const int64_t blocks = p.order.padded / kOrderKeys;
  if (block >= p.order.images * blocks) {
    return;
  }
  const int64_t image = block / blocks;
  const int64_t own = block % blocks;
  const int32_t* const ids = p.order.ids + image * p.order.padded + own * kOrderKeys;
  const int32_t id[2] = {ids[lane], ids[32 + lane]};
  float* const to = p.order.features + block * p.order.width * kOrderKeys;
  for (int k = 0; k < p.order.width; ++k) {
    float low[2];
    float high[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = 0;
      if (id[half] >= 0 && k < p.dims) {
        x = p.features[image * p.strides[0] + k * p.strides[1] + id[half] * p.strides[2]];
      }
      low[half] = id[half] >= 0 ? x : INFINITY;
      high[half] = id[half] >= 0 ? x : -INFINITY;
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        low[half] = fminf(low[half], __shfl_xor_sync(~0U, low[half], distance));
        high[half] = fmaxf(high[half], __shfl_xor_sync(~0U, high[half], distance));
      }
      // A place in the box, where there is one.
      const float some = low[half] <= high[half] ? low[half] : low[0] <= high[0] ? low[0] : 0.0F;
      to[k * kOrderKeys + 32 * half + lane] = id[half] >= 0 ? x : some;
    }
    if (lane == 0) {
      float* const keys = p.order.keys + image * (2 * p.order.width) * blocks + own;
      keys[k * blocks] = fminf(low[0], low[1]);
      keys[(p.order.width + k) * blocks] = fmaxf(high[0], high[1]);
      float* const queries = p.order.queries + image * (2 * p.order.width) * (2 * blocks) + 2 * own;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        queries[k * 2 * blocks + half] = low[half];
        queries[(p.order.width + k) * 2 * blocks + half] = high[half];
      }
    }
  }
}

}  // namespace pydense
