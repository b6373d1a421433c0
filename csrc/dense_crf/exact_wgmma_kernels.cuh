// SPDX-License-Identifier: Apache-2.0
// The twin of exact_fast_kernels.cuh on the tensor cores of sm_90a, with the same rounding, lists
// of runs and order of sums. A block has 128 queries, four warps 64 of them, which are left out
// together. One product makes the exponents of 64 x 64 pairs in registers; there they become kernel
// values, which are the left operand of products with the values. While the second half of them is
// made, the first half is multiplied, and while the second is, the threads of four warps, in turn,
// make the keys of the next run. Blocks share a multiprocessor, so that one's powers of two run
// beside the products of others.
//
// EXPERIMENTAL: never run on a GPU. The shim runs it.
#pragma once

#include "dense_crf/exact_wgmma_weights.cuh"

namespace pydense {

template <class Weights, int kDims, int kWidth>
class ExactWgmma {
  using Shared = FilterShared<kDims, kWidth>;
  using Block = FastBlock<kDims, kFilterThreads>;
  static constexpr int kStages = Shared::kStages;
  // Whether registers last for making keys beside products.
  static constexpr bool kOverlap = kDims <= 5 && kWidth <= 24;

 public:
  __device__ __forceinline__ ExactWgmma(Block& block, Shared& shared)
      : block_(block),
        shared_(shared),
        weights_(shared),
        half_(__shfl_sync(~0U, fast_thread() / 128, 0)),
        values_(block.template values<kWidth>(0) + fast_thread() * 4),
        features_(block.features(0) + fast_thread() * 4) {}

  __device__ __forceinline__ void run() {
    weights_.load_queries(block_.query_features());
    block_.for_lists([this](int count) { multiply_listed(count); });
    const Block block = block_.again();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = fast_warp() * 16 + 8 * half + fast_lane() / 4;
      block.write(query, weights_.factor(query), sums_, half);
    }
  }

 private:
  __device__ __forceinline__ void multiply_listed(int count) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i < count) {
        bring(i, i);
      }
      copy_async_commit();
    }
    copy_async_wait<1>();
    __syncthreads();
    if (count > 0 && half_ == 0) {
      weights_.make_keys(shared_.features[0], 0);
    }
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      copy_async_wait<0>();
      show_to_products();
      __syncthreads();
      const int next = stage + 1 < kStages ? stage + 1 : 0;
      if (i + 2 < count) {
        bring(i + 2, stage > 0 ? stage - 1 : kStages - 1);
      }
      copy_async_commit();
      const uint32_t entry = shared_.near.list[i];
      // The same for all threads of four warps, and known to be.
      const bool needed = __shfl_sync(~0U, entry >> (28 + 2 * half_) & 3U, 0) != 0;
      const bool makes = i + 1 < count && (i + 1) % 2 == half_;
      uint32_t weights[8][4];
      if (needed) {
        multiply(entry & 0x0FFFFFFFU, i % 2, stage, weights);
      }
      if constexpr (!kOverlap) {
        wgmma_wait<0>();
        wgmma_settle(sums_);
      }
      if (makes) {
        weights_.make_keys(shared_.features[next], (i + 1) % 2);
      }
      if constexpr (kOverlap) {
        wgmma_wait<0>();
        wgmma_settle(sums_);
      }
      stage = next;
    }
  }

  __device__ __forceinline__ void bring(int i, int stage) const {
    const int64_t run = shared_.near.list[i] & 0x0FFFFFFFU;
    copy_run<Shared::kValues>(shared_.values[stage], values_ + run * Shared::kValues);
    copy_run<Shared::kFeatures>(shared_.features[stage], features_ + run * Shared::kFeatures);
  }
  // 16 bytes of each thread at a time; `from` is the thread's own place.
  template <int kCount>
  __device__ __forceinline__ static void copy_run(float* to, const float* from) {
#pragma unroll
    for (int first = 0; first < kCount; first += 4 * kFilterThreads) {
      if (first + 4 * kFilterThreads <= kCount || first + fast_thread() * 4 < kCount) {
        copy_async_16(to + first + fast_thread() * 4, from + first, true);
      }
    }
  }

  // Leaves the products under way; they read `weights`.
  __device__ __forceinline__ void multiply(uint32_t run, int keys, int stage,
                                           uint32_t (&weights)[8][4]) {
    float exponents[8][4];
    weights_.exponents(shared_.features[stage], keys, exponents);
    if (block_.hides(run)) {
      const int self = static_cast<int>(run % 2) * kFastKeys - fast_warp() * 16;  // key 0's query
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int j = i / 4;
        const int e = i % 4;
        const int key = self + 8 * j + e % 2 * 4 + fast_lane() % 4;
        exponents[j][e] = key == fast_lane() / 4 + e / 2 * 8 ? -INFINITY : exponents[j][e];
      }
    }
    const uint64_t values = matrix_descriptor(shared_.values[stage]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 4 * half; j < 4 * half + 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // rows before columns
          weights[j][e / 2 + e % 2 * 2] = near_tf32(fast_exp2(exponents[j][e]));
        }
      }
      wgmma_fence();
#pragma unroll
      for (int j = 4 * half; j < 4 * half + 4; ++j) {
        const int at = half * kWidth * 128 + j % 4 * 32;
        wgmma_k8_tf32(sums_, weights[j], values + matrix_descriptor_step(at));
      }
      wgmma_commit();
    }
  }

  Block& block_;
  Shared& shared_;
  Weights weights_;
  int half_;  // of the block's threads
  const float* values_;
  const float* features_;
  float sums_[kWidth / 8][4] = {};
};

// Two blocks of a multiprocessor, or one.
template <int kDims, int kWidth>
__global__ __launch_bounds__(
    kFilterThreads, kDims <= 5 || kWidth <= 24
                        ? 2
                        : 1) void exact_wgmma_kernel(const __grid_constant__ FastParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PYDENSE_SIMT)
  PYDENSE_DYNAMIC_SHARED(unsigned char, bytes);
  const uint32_t over = shared_address(bytes) % 1024;
  auto& shared = *reinterpret_cast<FilterShared<kDims, kWidth>*>(bytes + (1024 - over) % 1024);
  FastBlock<kDims, kFilterThreads> block(p, shared.near);
  const float squares = block.find_boxes();
  if (squares <= kFastReach * kFastReach && kDims <= 5) {
    ExactWgmma<WgmmaProducts<kDims, 2, kWidth>, kDims, kWidth>(block, shared).run();
  } else if (squares <= kFastFar * kFastFar) {
    ExactWgmma<WgmmaProducts<kDims, 3, kWidth>, kDims, kWidth>(block, shared).run();
  } else {
    ExactWgmma<WgmmaDifferences<kDims, kWidth>, kDims, kWidth>(block, shared).run();
  }
#else
  __trap();  // code for another card, which never has it
#endif
}

}  // namespace pydense
