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
  static constexpr int kValues = Shared::kValues;
  static constexpr int kStage = Shared::kStage;
  static constexpr int kFeatures = kDims * kFastKeys;
  static constexpr int kWarps = Shared::kWarps;

 public:
  __device__ __forceinline__ ExactFast(const FastParams& p, Shared& shared)
      : p_(p), shared_(shared), weights_(shared), blocks_(p.order.padded / kFastKeys) {
    uint32_t item = blockIdx.x;
    tile_ = item % static_cast<uint32_t>(p.order.tiles);
    item /= static_cast<uint32_t>(p.order.tiles);
    chunk_ = static_cast<int32_t>(item % static_cast<uint32_t>(p.row_chunks));
    item /= static_cast<uint32_t>(p.row_chunks);
    segment_ = static_cast<int32_t>(item % static_cast<uint32_t>(p.segments));
    image_ = item / static_cast<uint32_t>(p.segments);
  }

  // The boxes of the warps' queries and their middle. Returns how far queries are from it at most,
  // squared.
  __device__ __forceinline__ float find_boxes() {
    for (int i = thread(); i < 2 * kDims * kWarps; i += kFastThreads) {
      shared_.boxes[i / kWarps][i % kWarps] =
          p_.order.queries[(image_ * (2 * kDims) + i / kWarps) * (2 * blocks_) + tile_ * kWarps +
                           i % kWarps];
    }
    __syncthreads();
    if (thread() < kDims) {
      float low = INFINITY;
      float high = -INFINITY;
      for (int w = 0; w < kWarps; ++w) {
        low = fminf(low, shared_.boxes[thread()][w]);
        high = fmaxf(high, shared_.boxes[kDims + thread()][w]);
      }
      shared_.middle[thread()] = 0.5F * low + 0.5F * high;
      shared_.reach[thread()] = 0.5F * high - 0.5F * low;
    }
    __syncthreads();
    float squares = 0;
#pragma unroll
    for (int k = 0; k < kDims; ++k) {
      squares = fmaf(shared_.reach[k], shared_.reach[k], squares);
    }
    return squares;
  }

  __device__ __forceinline__ void run() {
    weights_.load_queries(p_.order.features + (image_ * blocks_ + tile_ * 2) * (kDims * kFastKeys));
    int64_t next = segment_;
    while (next < blocks_) {
      __syncthreads();
      int count = 0;
      while (next < blocks_ && count <= Shared::kList - kFastThreads) {
        count = list_near(next + static_cast<int64_t>(threadIdx.x) * p_.segments, count);
        next += int64_t{kFastThreads} * p_.segments;
      }
      multiply_listed(count);
    }
    write();
  }

 private:
  __device__ __forceinline__ static int thread() { return fast_thread(); }
  __device__ __forceinline__ static int lane() { return fast_lane(); }
  __device__ __forceinline__ static int warp() { return fast_warp(); }

  // Adds those of the block's runs of keys, one of each thread, that some warp needs.
  __device__ __forceinline__ int list_near(int64_t block, int count) {
    uint32_t entry = 0;
    if (block < blocks_) {
      float squares[kWarps] = {};
      const float* const box = p_.order.keys + image_ * (2 * kDims) * blocks_ + block;
#pragma unroll
      for (int k = 0; k < kDims; ++k) {
        const float low = box[k * blocks_];
        const float high = box[(kDims + k) * blocks_];
        const auto lows = load_vector<kWarps>(shared_.boxes[k]);
        const auto highs = load_vector<kWarps>(shared_.boxes[kDims + k]);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float gap = fmaxf(fmaxf(low - highs[w], lows[w] - high), 0.0F);
          squares[w] = fmaf(gap, gap, squares[w]);
        }
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        entry |= squares[w] > p_.limit ? 0U : 1U << (28 + w);
      }
      entry |= entry != 0 ? static_cast<uint32_t>(block) : 0U;
    }
    const unsigned near = __ballot_sync(~0U, entry != 0 ? 1 : 0);
    if (lane() == 0) {
      shared_.counts[warp()] = __popc(near);
    }
    __syncthreads();
    int at = count;
    for (int w = 0; w < kWarps; ++w) {
      at += w < warp() ? shared_.counts[w] : 0;
      count += shared_.counts[w];
    }
    if (entry != 0) {
      shared_.list[at + __popc(near & ((1U << lane()) - 1))] = entry;
    }
    __syncthreads();
    return count;
  }

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
      const uint32_t entry = shared_.list[i];
      if ((entry >> (28 + warp()) & 1U) != 0) {
        const float* const values = shared_.values + i % 2 * kStage;
        const uint32_t block = entry & 0x0FFFFFFFU;
        const bool own = !p_.self_term && block / 2 == tile_;
        own ? multiply<true>(features, values, block) : multiply<false>(features, values, block);
      }
    }
  }

  __device__ __forceinline__ void bring(int i, int stage) const {
    const int64_t block = shared_.list[i] & 0x0FFFFFFFU;
    const float* const values =
        p_.packed + ((image_ * p_.row_chunks + chunk_) * blocks_ + block) * kValues;
    copy_run<kValues / 4>(shared_.values + stage * kStage, values);
    copy_run<kFeatures / 4>(shared_.features[stage],
                            p_.order.features + (image_ * blocks_ + block) * kFeatures);
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
                                           uint32_t block) {
    [[maybe_unused]] const int self =
        static_cast<int>(block % 2) * kFastKeys - warp() * 32;  // key 0's own query
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

  // Rounded, once the lower bits are left out, as the product does.
  __device__ __forceinline__ static uint32_t near_tf32(float x) {
    return __float_as_uint(x) + 0x1000U;
  }

  __device__ __forceinline__ void write() const {
    const int64_t row = int64_t{chunk_} * p_.chunk_rows;
    const int rows = static_cast<int>(min(int64_t{p_.chunk_rows}, p_.rows - row));
    float* const out = p_.out + segment_ * p_.all + (image_ * p_.rows + row) * p_.order.points;
    const int32_t* const ids = p_.order.ids + image_ * p_.order.padded + tile_ * kOrderTile;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = warp() * 32 + 16 * m + 8 * half + lane() / 4;
        const int32_t id = ids[query];
        const float factor = weights_.factor(query);
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int channel = 8 * n + lane() % 4 * 2 + e;
            if (id >= 0 && channel < rows) {
              out[channel * p_.order.points + id] = factor * sums_[m][n][2 * half + e];
            }
          }
        }
      }
    }
  }

  const FastParams& p_;
  Shared& shared_;
  Weights weights_;
  int64_t blocks_;  // runs of keys of an image
  int64_t tile_;
  int32_t chunk_;
  int32_t segment_;
  int64_t image_;
  float sums_[2][kWidth / 8][4] = {};
};

// Where queries are at most so far from their middle two parts are enough, and three.
constexpr float kFastReach = 3;
constexpr float kFastFar = 32;

template <int kDims, int kWidth>
__global__ __launch_bounds__(kFastThreads,
                             kDims <= 5 && kWidth <= 24
                                 ? 3
                                 : 2) void exact_fast_kernel(const __grid_constant__ FastParams p) {
  __shared__ FastShared<kDims, kWidth> shared;
  ExactFast<FastProducts<kDims, 3, kWidth>, kDims, kWidth> wide(p, shared);
  const float squares = wide.find_boxes();
  if (squares <= kFastReach * kFastReach && kDims <= 5) {
    ExactFast<FastProducts<kDims, 2, kWidth>, kDims, kWidth>(p, shared).run();
  } else if (squares <= kFastFar * kFastFar) {
    wide.run();
  } else {
    ExactFast<FastDifferences<kDims, kWidth>, kDims, kWidth>(p, shared).run();
  }
}

}  // namespace pydense
