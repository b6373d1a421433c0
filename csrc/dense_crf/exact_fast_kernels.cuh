// SPDX-License-Identifier: Apache-2.0
// The filter of exact_fast.h. A block has 128 queries, a warp 32 of them, and goes over the runs of
// 64 keys that are near enough. A kernel value is 2^(a b - |a|^2 / 2 - |b|^2 / 2) with a and b
// taken from the middle of the block's queries, where they are small, times log2(e): a product in
// which a and b are sums of two numbers of bfloat16 (what is left out is 2^-17 of |a| |b|), or of
// three where the queries lie far apart, with -|a|^2 / 2 as its last number; -|b|^2 / 2 is what the
// product is added to. All of these are as large as |a|^2 while their sum is small: they are summed
// in float, to within some 2^-23 of |a|^2, too rough where the queries lie farther apart still.
// There exponents are squares of differences. Kernel values and values are rounded to TF32, each
// within 2^-12 of it and on its own, and summed in float.
#pragma once

#include "common/exp2.cuh"
#include "dense_crf/exact_fast_weights.cuh"

namespace pydense {

// Weights: makes the exponents. kWidth: rows of values.
template <class Weights, int kDims, int kWidth>
class ExactFast {
  using Shared = FastShared<kDims, kWidth>;
  using Block = FastBlock<kDims, kFastThreads>;
  static constexpr int kValues = Shared::kValues;
  static constexpr int kStage = Shared::kStage;
  static constexpr int kFeatures = kDims * kFastKeys;

 public:
  __device__ __forceinline__ ExactFast(Block& block, Shared& shared)
      : block_(block), shared_(shared), weights_(shared) {}

  __device__ __forceinline__ void run() {
    weights_.load_queries(block_.query_features());
    block_.for_lists([this](int count) { multiply_listed(count); });
    const Block block = block_.again();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = warp() * 32 + 16 * m + 8 * half + lane() / 4;
        block.write(query, weights_.factor(query), sums_[m], half);
      }
    }
  }

 private:
  __device__ __forceinline__ static int thread() { return fast_thread(); }
  __device__ __forceinline__ static int lane() { return fast_lane(); }
  __device__ __forceinline__ static int warp() { return fast_warp(); }

  __device__ __forceinline__ void multiply_listed(int count) {
    if (count > 0) {
      bring(0, 0);
    }
    copy_async_commit();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      copy_async_wait<0>();
      __syncthreads();
      if (i + 1 < count) {
        bring(i + 1, (i + 1) % 2);
      }
      copy_async_commit();
      const float* const features = shared_.features[i % 2];
      weights_.make_keys(features);
      __syncthreads();
      const uint32_t entry = shared_.near.list[i];
      if ((entry >> (28 + warp()) & 1U) != 0) {
        const float* const values = shared_.values + i % 2 * kStage;
        const uint32_t run = entry & 0x0FFFFFFFU;
        block_.hides(run) ? multiply<true>(features, values, run)
                          : multiply<false>(features, values, run);
      }
    }
  }

  __device__ __forceinline__ void bring(int i, int stage) const {
    const int64_t run = shared_.near.list[i] & 0x0FFFFFFFU;
    copy_run<kValues / 4>(shared_.values + stage * kStage, block_.template values<kWidth>(run));
    copy_run<kFeatures / 4>(shared_.features[stage], block_.features(run));
  }
  template <int kVectors>
  __device__ __forceinline__ static void copy_run(float* to, const float* from) {
#pragma unroll
    for (int first = 0; first < kVectors; first += kFastThreads) {
      const int v = first + thread();
      if (first + kFastThreads <= kVectors || v < kVectors) {
        copy_async_16(to + v * 4, from + v * 4, true);
      }
    }
  }

  // kOwn: without the points themselves.
  template <bool kOwn>
  __device__ __forceinline__ void multiply(const float* features, const float* values,
                                           uint32_t run) {
    [[maybe_unused]] const int self =
        static_cast<int>(run % 2) * kFastKeys - warp() * 32;  // key 0's own query
#pragma unroll(Weights::kUnroll)
    for (int first = 0; first < kFastKeys; first += 16) {
      float exponents[2][2][4];
      weights_.exponents(features, first, exponents);
      uint32_t weights[2][2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float d[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            d[e] = fast_exp2(exponents[m][j][e]);
          }
          if constexpr (kOwn) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int key = self + first + lane() % 4 * 4 + 2 * j + e % 2;
              d[e] = key == 16 * m + lane() / 4 + e / 2 * 8 ? 0.0F : d[e];
            }
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {  // rows before columns
            weights[m][j][e / 2 + e % 2 * 2] = near_tf32(d[e]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        const auto v =
            load_vector<4>(values + fast_value_at(n * 8 + lane() / 4, first / 4 + lane() % 4));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t b[2] = {__float_as_uint(v[2 * j]), __float_as_uint(v[2 * j + 1])};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma_m16n8k8(sums_[m][n], weights[m][j], b);
          }
        }
      }
    }
  }

  Block& block_;
  Shared& shared_;
  Weights weights_;
  float sums_[2][kWidth / 8][4] = {};
};

template <int kDims, int kWidth>
__global__ __launch_bounds__(kFastThreads,
                             kDims <= 5 && kWidth <= 24
                                 ? 3
                                 : 2) void exact_fast_kernel(const __grid_constant__ FastParams p) {
  __shared__ FastShared<kDims, kWidth> shared;
  FastBlock<kDims, kFastThreads> block(p, shared.near);
  const float squares = block.find_boxes();
  if (squares <= kFastReach * kFastReach && kDims <= 5) {
    ExactFast<FastProducts<kDims, 2, kWidth>, kDims, kWidth>(block, shared).run();
  } else if (squares <= kFastFar * kFastFar) {
    ExactFast<FastProducts<kDims, 3, kWidth>, kDims, kWidth>(block, shared).run();
  } else {
    ExactFast<FastDifferences<kDims, kWidth>, kDims, kWidth>(block, shared).run();
  }
}

}  // namespace pydense
