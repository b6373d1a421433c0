// SPDX-License-Identifier: Apache-2.0
// Kernel values of 64 queries of four warps with 64 keys, for exact_wgmma_kernels.cuh: their
// exponents, as in exact_fast_weights.cuh. Element d[j][e] of a thread is that of query
// 8 (e / 2) + lane / 4 of its warp's 16 and key 8 j + 4 (e % 2) + lane % 4, which is where products
// of TF32 want it: keys are made in an order of their own, values stay in theirs.
#pragma once

#include "common/wgmma.cuh"
#include "dense_crf/exact_fast_weights.cuh"

namespace pydense {

constexpr int kFilterThreads = 256;  // eight warps with 16 queries each
static_assert(kOrderTile == kFilterThreads / 2);

template <int kDims, int kWidth>
struct FilterShared {
  static constexpr int kValues = kWidth * kFastKeys;
  static constexpr int kFeatures = kDims * kFastKeys;
  static constexpr int kDepth = FastNumbers<kDims, 3>::kDepth;
  static constexpr int kStages = 3;

  // Operands of products: the first one at a multiple of 1024 bytes, and so are the others.
  static_assert(kValues * sizeof(float) % 1024 == 0 && kFastKeys * kDepth * 2 % 1024 == 0);
  // Of runs of keys: the one that is multiplied, the next and the one after.
  alignas(16) float values[kStages][kValues];
  // Of the run that is multiplied and of the next. Queries pass through here.
  alignas(16) uint16_t keys[2][kFastKeys * kDepth];
  alignas(16) float features[kStages][kFeatures];
  alignas(16) float norms[2][kFastKeys];  // -|b|^2 / 2
  float factors[kOrderTile];
  FastNear<kDims, kFilterThreads> near;
};

// By a product. kParts: numbers of bfloat16 for each of a feature.
template <int kDims, int kParts, int kWidth>
class WgmmaProducts {
  using Shared = FilterShared<kDims, kWidth>;
  using Numbers = FastNumbers<kDims, kParts>;
  static constexpr int kSteps = Numbers::kSteps;
  static constexpr int kRowBytes = 2 * Numbers::kDepth;

 public:
  __device__ __forceinline__ explicit WgmmaProducts(Shared& shared) : shared_(shared) {}

  __device__ __forceinline__ void load_queries(const float* features) {
    uint16_t* const queries = shared_.keys[0];
    if (fast_thread() < kOrderTile) {
      shared_.factors[fast_thread()] =
          Numbers::make_query(features, shared_.near.middle, fast_thread(), queries);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      load_matrix_x4(queries_[s], queries + Numbers::place(fast_warp() * 16 + fast_lane() % 16,
                                                           2 * s + fast_lane() / 16));
    }
  }

  // What kernel values with a query are to be multiplied by.
  __device__ __forceinline__ float factor(int query) const { return shared_.factors[query]; }

  // By the threads of four warps.
  __device__ __forceinline__ void make_keys(const float* features, int stage) {
    const int key = fast_thread() % kFastKeys;
    const int at = key / 8 * 8 + key % 4 * 2 + key % 8 / 4;
    const float* const middle = shared_.near.middle;
    uint16_t* const keys = shared_.keys[stage];
    float* const norms = shared_.norms[stage];
    if (fast_warp() % 4 < 2) {
      Numbers::template make_key<0>(features, middle, key, at, keys, norms);
    } else {
      Numbers::template make_key<1>(features, middle, key, at, keys, norms);
    }
  }

  __device__ __forceinline__ void exponents(const float* /*features*/, int stage,
                                            float (&d)[8][4]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const auto norm = load_vector<2>(shared_.norms[stage] + 8 * j + fast_lane() % 4 * 2);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        d[j][e] = norm[e % 2];
      }
    }
    const uint64_t keys = matrix_descriptor<kRowBytes>(shared_.keys[stage]);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      wgmma_m64n64k16_bf16(d, queries_[s], keys + matrix_descriptor_step(32 * s));
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
  }

 private:
  Shared& shared_;
  uint32_t queries_[kSteps][4];
};

// From differences of features, in float.
template <int kDims, int kWidth>
class WgmmaDifferences {
 public:
  __device__ __forceinline__ explicit WgmmaDifferences(FilterShared<kDims, kWidth>& /*shared*/) {}

  __device__ __forceinline__ void load_queries(const float* features) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int query = fast_warp() * 16 + 8 * q + fast_lane() / 4;
#pragma unroll
      for (int k = 0; k < kDims; ++k) {
        queries_[q][k] = features[(query / kFastKeys * kDims + k) * kFastKeys + query % kFastKeys];
      }
    }
  }

  __device__ __forceinline__ float factor(int /*query*/) const { return 1; }

  __device__ __forceinline__ void make_keys(const float* /*features*/, int /*stage*/) {}

  __device__ __forceinline__ void exponents(const float* features, int /*stage*/,
                                            float (&d)[8][4]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int right = 0; right < 2; ++right) {
#pragma unroll
        for (int k = 0; k < kDims; ++k) {
          const float key = features[k * kFastKeys + 8 * j + 4 * right + fast_lane() % 4];
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const float difference = key - queries_[q][k];
            d[j][2 * q + right] = fmaf(difference, difference, k == 0 ? 0.0F : d[j][2 * q + right]);
          }
        }
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          d[j][2 * q + right] *= -0.5F * kLog2E;
        }
      }
    }
  }

 private:
  float queries_[2][kDims];
};

}  // namespace pydense
