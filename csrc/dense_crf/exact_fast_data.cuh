// SPDX-License-Identifier: Apache-2.0
// What the kernels of exact_fast.h share: their parameters, and values as they take them: in the
// order of the points, 64 at a time, rounded to TF32.
#pragma once

#include "common/mma.cuh"
#include "dense_crf/exact_fast.h"

namespace pydense {

constexpr int kFastThreads = static_cast<int>(kOrderTile);
constexpr int kFastKeys = static_cast<int>(kOrderKeys);
constexpr float kLog2E = 1.44269504088896340736F;

struct FastParams {
  PointOrder order;
  const float* values;
  int64_t value_strides[3];
  float* packed;  // [images, row_chunks, padded / 64, width, 64], see fast_pack_kernel
  float* out;     // [segments, images, rows, points]
  int64_t rows;   // of an image: copies * channels
  int64_t channels;
  int64_t copies;
  int64_t all;  // images * rows * points
  int32_t row_chunks;
  int32_t chunk_rows;
  int32_t segments;
  float limit;  // of a squared distance, beyond which pairs are left out
  bool self_term;
  bool swizzled;  // packed values, as products of four warps read them
};

// Where 4 keys of a row lie: those that a product reads of two rows are in all banks.
__device__ __forceinline__ int fast_value_at(int row, int vector) {
  return row * kFastKeys + (vector ^ (row % 2 * 4)) * 4;
}
// The same for products of four warps: rows of 32 keys, swizzled (wgmma.cuh), of the first half of
// a run's keys and then of the second.
template <int kWidth>
__device__ __forceinline__ int fast_swizzled_value_at(int row, int vector) {
  return (vector / 8 * kWidth + row) * (kFastKeys / 2) + (vector % 8 ^ row % 8) * 4;
}

// A block has 64 keys, a thread 4 of them and a row.
template <int kWidth>
__global__ __launch_bounds__(kWidth *
                             16) void fast_pack_kernel(const __grid_constant__ FastParams p) {
  const int64_t blocks = p.order.padded / kFastKeys;
  const int64_t block = blockIdx.x % static_cast<uint32_t>(blocks);
  const int64_t item = blockIdx.x / static_cast<uint32_t>(blocks);
  const int64_t image = item / p.row_chunks;
  const int row = static_cast<int>(threadIdx.x) / 16;
  const int vector = static_cast<int>(threadIdx.x) % 16;
  const int64_t own = item % p.row_chunks * p.chunk_rows + row;
  const bool valid = row < p.chunk_rows && own < p.rows;
  const int64_t batch = image * p.copies + own / p.channels;
  const float* const from =
      p.values + batch * p.value_strides[0] + own % p.channels * p.value_strides[1];
  const auto ids =
      load_vector<4>(p.order.ids + image * p.order.padded + block * kFastKeys + vector * 4);
  Vector<float, 4> v;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float x = valid && ids[e] >= 0 ? from[ids[e] * p.value_strides[2]] : 0.0F;
    v[e] = __uint_as_float(round_to_tf32(__float_as_uint(x)));
  }
  const int at =
      p.swizzled ? fast_swizzled_value_at<kWidth>(row, vector) : fast_value_at(row, vector);
  store_global_vector(p.packed + (item * blocks + block) * (kWidth * kFastKeys) + at, v);
}

// The boxes of a block's queries, and which runs of keys are near.
template <int kDims, int kThreads>
struct FastNear {
  static constexpr int kBoxes = kFastThreads / 32;  // of 32 queries
  static constexpr int kList = 512;                 // runs of keys at a time

  alignas(16) float boxes[2 * kDims][kBoxes];
  float middle[kDims];
  float reach[kDims];    // of the queries from the middle
  uint32_t list[kList];  // a run, and above it a bit for every box of queries that needs it
  int32_t counts[kThreads / 32];
};

template <int kDims, int kWidth>
struct FastShared {
  static constexpr int kDepth = (6 * kDims + 16) / 16 * 16;
  static constexpr int kValues = kWidth * kFastKeys;
  // Queries pass through the place of two runs of values.
  static constexpr int kStage =
      4 * kValues > kFastThreads* kDepth ? kValues : kFastThreads * kDepth / 4;
  static constexpr int kWarps = kFastThreads / 32;

  // Of two runs of keys: one is multiplied while the next is on its way.
  alignas(16) float values[2 * kStage];
  alignas(16) float features[2][kDims * kFastKeys];
  alignas(16) uint16_t keys[kFastKeys * kDepth];
  alignas(16) float norms[kFastKeys];  // -|b|^2 / 2
  float factors[kFastThreads];
  FastNear<kDims, kFastThreads> near;
};

}  // namespace pydense
