// SPDX-License-Identifier: Apache-2.0
// Kernel values of 32 queries of a warp with 64 keys, for exact_fast_kernels.cuh: their exponents,
// as a matrix product or from differences, 16 keys at a time. Element d[m][j][e] of a thread is
// that of query 16 m + 8 (e / 2) + lane / 4 and key 4 (lane % 4) + 2 j + e % 2.
#pragma once

#include "common/exp2.cuh"
#include "common/mma.cuh"
#include "dense_crf/exact_fast_near.cuh"

namespace pydense {

// Where queries are at most so far from their middle two parts are enough, and three.
constexpr float kFastReach = 3;
constexpr float kFastFar = 32;

// Rounded to TF32, once the lower bits are left out, as the product does.
__device__ __forceinline__ uint32_t near_tf32(float x) { return __float_as_uint(x) + 0x1000U; }

// Rows of a product's depth: all that is multiplied with all of a query and of a key. kParts:
// numbers of bfloat16 for each of a feature.
template <int kDims, int kParts>
struct FastNumbers {
  static constexpr int kSlots = kParts == 2 ? 3 : 6;  // of a dimension in the product's depth
  static constexpr int kNorm = kSlots * kDims;        // the place of -|a|^2 / 2
  static constexpr int kDepth = (kNorm + 16) / 16 * 16;
  static constexpr int kSteps = kDepth / 16;

  // The parts that meet in a slot; their order is at most that of the last part.
  static constexpr __device__ __forceinline__ int query_part(int slot) {
    return slot == 5 ? 2 : slot == 2 || slot == 4 ? 1 : 0;
  }
  static constexpr __device__ __forceinline__ int key_part(int slot) {
    return slot == 3 ? 2 : slot == 1 || slot == 4 ? 1 : 0;
  }

  // Rows are turned so that eight of them lie in all banks, which is how products of four warps
  // want them, too (wgmma.cuh).
  __device__ __forceinline__ static int place(int row, int vector) {
    const int turn = kSteps == 1 ? row / 4 % 2 : kSteps == 2 ? row / 2 % 4 : row % 8;
    return row * kDepth + (vector ^ turn) * 8;
  }

  // A row of `queries`; features: of the block's queries, [2, kDims, kFastKeys]. Returns what
  // kernel values are to be multiplied by for what of |a|^2 / 2 is not in the product.
  __device__ __forceinline__ static float make_query(const float* features, const float* middle,
                                                     int query, uint16_t* queries) {
    const float* const from =
        features + query / kFastKeys * (kDims * kFastKeys) + query % kFastKeys;
    uint16_t row[kDepth] = {};
    float norm = 0;
#pragma unroll
    for (int k = 0; k < kDims; ++k) {
      const float a = from[k * kFastKeys] - middle[k];
      norm = fmaf(a, a, norm);
      uint16_t parts[kParts];
      split_bfloat16(a, parts);
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        row[kSlots * k + s] = parts[query_part(s)];
      }
    }
    norm *= -0.5F * kLog2E;
    uint16_t rounded[1];
    split_bfloat16(norm, rounded);
    row[kNorm] = rounded[0];
    store_row<0, kDepth>(queries, query, row);
    return fast_exp2(norm - bfloat16_value(rounded[0]));
  }

  // Half of row `at` of `keys`, with the first one its norm; features: of a run.
  template <int kHalf>
  __device__ __forceinline__ static void make_key(const float* features, const float* middle,
                                                  int key, int at, uint16_t* keys, float* norms) {
    constexpr int kFirst = kHalf * kDepth / 2;
    constexpr int kEnd = kFirst + kDepth / 2;
    // So far away kernel values are 0 anyway; numbers of bfloat16 with all their parts end before
    // those of float do.
    constexpr float kAway = 1e18F;
    uint16_t row[kDepth] = {};
    float norm = 0;
#pragma unroll
    for (int k = 0; k < kDims; ++k) {
      const float b = features[k * kFastKeys + key] - middle[k];
      if (kHalf == 0) {
        norm = fmaf(b, b, norm);
      }
      if (kSlots * (k + 1) > kFirst && kSlots * k < kEnd) {
        uint16_t parts[kParts];
        split_bfloat16(fminf(fmaxf(b, -kAway), kAway) * kLog2E, parts);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          row[kSlots * k + s] = parts[key_part(s)];
        }
      }
    }
    row[kNorm] = 0x3F80;  // 1
    store_row<kFirst, kEnd>(keys, at, row);
    if (kHalf == 0) {
      norms[at] = norm * (-0.5F * kLog2E);
    }
  }

 private:
  template <int kFirst, int kEnd>
  __device__ __forceinline__ static void store_row(uint16_t* to, int row,
                                                   const uint16_t (&from)[kDepth]) {
#pragma unroll
    for (int first = kFirst; first < kEnd; first += 8) {
      Vector<uint16_t, 8> v;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        v[e] = from[first + e];
      }
      store_vector(to + place(row, first / 8), v);
    }
  }
};

// By a product.
template <int kDims, int kParts, int kWidth>
class FastProducts {
  using Shared = FastShared<kDims, kWidth>;
  using Numbers = FastNumbers<kDims, kParts>;
  static constexpr int kSteps = Numbers::kSteps;

 public:
  static constexpr int kUnroll = kFastKeys / 16;

  __device__ __forceinline__ explicit FastProducts(Shared& shared) : shared_(shared) {}

  __device__ __forceinline__ void load_queries(const float* features) {
    uint16_t* const queries = reinterpret_cast<uint16_t*>(shared_.values);
    shared_.factors[fast_thread()] =
        Numbers::make_query(features, shared_.near.middle, fast_thread(), queries);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        load_matrix_x4(queries_[m][s],
                       queries + Numbers::place(fast_warp() * 32 + m * 16 + fast_lane() % 16,
                                                2 * s + fast_lane() / 16));
      }
    }
  }

  // What kernel values with a query are to be multiplied by.
  __device__ __forceinline__ float factor(int query) const { return shared_.factors[query]; }

  __device__ __forceinline__ void make_keys(const float* features) {
    const int key = fast_thread() % kFastKeys;
    // Of four neighbours a thread has two in a product and two in the next.
    const int at = key / 16 * 16 + key % 4 / 2 * 8 + key % 16 / 4 * 2 + key % 2;
    const float* const middle = shared_.near.middle;
    if (fast_warp() < Shared::kWarps / 2) {
      Numbers::template make_key<0>(features, middle, key, at, shared_.keys, shared_.norms);
    } else {
      Numbers::template make_key<1>(features, middle, key, at, shared_.keys, shared_.norms);
    }
  }

  __device__ __forceinline__ void exponents(const float* /*features*/, int first,
                                            float (&d)[2][2][4]) const {
    uint32_t keys[kSteps][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      load_matrix_x4(keys[s],
                     shared_.keys + Numbers::place(first + fast_lane() / 16 * 8 + fast_lane() % 8,
                                                   2 * s + fast_lane() / 8 % 2));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const auto norm = load_vector<2>(shared_.norms + first + 8 * j + fast_lane() % 4 * 2);
      const float norms[4] = {norm[0], norm[1], norm[0], norm[1]};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const uint32_t b[2] = {keys[s][2 * j], keys[s][2 * j + 1]};
          if (s == 0) {
            mma_m16n8k16_bf16(d[m][j], queries_[m][s], b, norms);
          } else {
            mma_m16n8k16<__nv_bfloat16>(d[m][j], queries_[m][s], b);
          }
        }
      }
    }
  }

 private:
  Shared& shared_;
  uint32_t queries_[2][kSteps][4];
};

// From differences of features, in float.
template <int kDims, int kWidth>
class FastDifferences {
 public:
  static constexpr int kUnroll = 1;  // to save registers

  __device__ __forceinline__ explicit FastDifferences(FastShared<kDims, kWidth>& /*shared*/) {}

  __device__ __forceinline__ void load_queries(const float* features) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int query = fast_warp() * 32 + 8 * q + fast_lane() / 4;
#pragma unroll
      for (int k = 0; k < kDims; ++k) {
        queries_[q][k] = features[(query / kFastKeys * kDims + k) * kFastKeys + query % kFastKeys];
      }
    }
  }

  __device__ __forceinline__ float factor(int /*query*/) const { return 1; }

  __device__ __forceinline__ void make_keys(const float* /*features*/) {}

  __device__ __forceinline__ void exponents(const float* features, int first,
                                            float (&d)[2][2][4]) const {
#pragma unroll
    for (int k = 0; k < kDims; ++k) {
      const auto keys = load_vector<4>(features + k * kFastKeys + first + fast_lane() % 4 * 4);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int m = i / 8;
        const int j = i / 4 % 2;
        const int e = i % 4;
        const float difference = keys[2 * j + e % 2] - queries_[2 * m + e / 2][k];
        d[m][j][e] = fmaf(difference, difference, k == 0 ? 0.0F : d[m][j][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      d[i / 8][i / 4 % 2][i % 4] *= -0.5F * kLog2E;
    }
  }

 private:
  float queries_[4][kDims];
};

}  // namespace pydense
