// SPDX-License-Identifier: Apache-2.0
// What a block of the kernels of exact_fast.h works on: the box around its queries, the runs of
// keys near to it, and where its results go.
#pragma once

#include "dense_crf/exact_fast_data.cuh"

namespace pydense {

__device__ __forceinline__ int fast_thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int fast_lane() { return fast_thread() % 32; }
__device__ __forceinline__ int fast_warp() { return fast_thread() / 32; }

template <int kDims, int kThreads>
class FastBlock {
  using Near = FastNear<kDims, kThreads>;
  static constexpr int kBoxes = Near::kBoxes;

 public:
  __device__ __forceinline__ FastBlock(const FastParams& p, Near& near) : p_(p), near_(near) {
    uint32_t item = static_cast<uint32_t>(opaque(static_cast<int>(blockIdx.x)));
    tile_ = item % static_cast<uint32_t>(p.order.tiles);
    item /= static_cast<uint32_t>(p.order.tiles);
    chunk_ = static_cast<int32_t>(item % static_cast<uint32_t>(p.row_chunks));
    item /= static_cast<uint32_t>(p.row_chunks);
    segment_ = static_cast<int32_t>(item % static_cast<uint32_t>(p.segments));
    image_ = item / static_cast<uint32_t>(p.segments);
  }

  // The same, found again: over a loop that has other use for its registers.
  __device__ __forceinline__ FastBlock again() const { return FastBlock(p_, near_); }

  // The boxes of 32 queries each and their middle. Returns how far queries are from it at most,
  // squared.
  __device__ __forceinline__ float find_boxes() {
    for (int i = fast_thread(); i < 2 * kDims * kBoxes; i += kThreads) {
      near_.boxes[i / kBoxes][i % kBoxes] =
          p_.order.queries[(int64_t{image_} * (2 * kDims) + i / kBoxes) * (2 * runs()) +
                           tile_ * kBoxes + i % kBoxes];
    }
    __syncthreads();
    if (fast_thread() < kDims) {
      const int k = fast_thread();
      float low = INFINITY;
      float high = -INFINITY;
      for (int w = 0; w < kBoxes; ++w) {
        low = fminf(low, near_.boxes[k][w]);
        high = fmaxf(high, near_.boxes[kDims + k][w]);
      }
      near_.middle[k] = 0.5F * low + 0.5F * high;
      near_.reach[k] = 0.5F * high - 0.5F * low;
    }
    __syncthreads();
    float squares = 0;
#pragma unroll
    for (int k = 0; k < kDims; ++k) {
      squares = fmaf(near_.reach[k], near_.reach[k], squares);
    }
    return squares;
  }

  // Features of the queries, [2, kDims, kFastKeys].
  __device__ __forceinline__ const float* query_features() const {
    return features(int64_t{tile_} * 2);
  }
  __device__ __forceinline__ const float* features(int64_t run) const {
    return p_.order.features + (image_ * runs() + run) * (kDims * kFastKeys);
  }
  template <int kWidth>
  __device__ __forceinline__ const float* values(int64_t run) const {
    return p_.packed + ((int64_t{image_} * p_.row_chunks + chunk_) * runs() + run) *
                           int64_t{kWidth * kFastKeys};
  }
  // Whether the run has queries of the block that shall not see themselves.
  __device__ __forceinline__ bool hides(uint32_t run) const {
    return !p_.self_term && run / 2 == tile_;
  }

  // Calls multiply(count) for lists of runs.
  template <class Multiply>
  __device__ __forceinline__ void for_lists(const Multiply& multiply) {
    const int64_t runs = this->runs();
    int64_t next = segment_;
    while (next < runs) {
      __syncthreads();
      const FastBlock block = again();
      int count = 0;
      while (next < runs && count <= Near::kList - kThreads) {
        count = block.list_near(next + static_cast<int64_t>(threadIdx.x) * p_.segments, count);
        next += int64_t{kThreads} * p_.segments;
      }
      multiply(count);
    }
  }

  // Those of one query, of which a thread has two of every eight.
  template <int kGroups>
  __device__ __forceinline__ void write(int query, float factor, const float (&sums)[kGroups][4],
                                        int half) const {
    const int64_t row = int64_t{chunk_} * p_.chunk_rows;
    const int rows = static_cast<int>(min(int64_t{p_.chunk_rows}, p_.rows - row));
    float* const out =
        p_.out + segment_ * p_.all + (int64_t{image_} * p_.rows + row) * p_.order.points;
    const int32_t id = p_.order.ids[image_ * p_.order.padded + tile_ * kOrderTile + query];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int channel = 8 * n + fast_lane() % 4 * 2 + e;
        if (id >= 0 && channel < rows) {
          out[channel * p_.order.points + id] = factor * sums[n][2 * half + e];
        }
      }
    }
  }

 private:
  // Of keys, of an image.
  __device__ __forceinline__ int64_t runs() const { return p_.order.padded / kFastKeys; }

  // Adds those of the block's runs of keys, one of each thread, that some box of queries needs.
  __device__ __forceinline__ int list_near(int64_t run, int count) const {
    const int64_t runs = this->runs();
    uint32_t entry = 0;
    if (run < runs) {
      float squares[kBoxes] = {};
      const float* const box = p_.order.keys + int64_t{image_} * (2 * kDims) * runs + run;
#pragma unroll
      for (int k = 0; k < kDims; ++k) {
        const float low = box[k * runs];
        const float high = box[(kDims + k) * runs];
        const auto lows = load_vector<kBoxes>(near_.boxes[k]);
        const auto highs = load_vector<kBoxes>(near_.boxes[kDims + k]);
#pragma unroll
        for (int w = 0; w < kBoxes; ++w) {
          const float gap = fmaxf(fmaxf(low - highs[w], lows[w] - high), 0.0F);
          squares[w] = fmaf(gap, gap, squares[w]);
        }
      }
#pragma unroll
      for (int w = 0; w < kBoxes; ++w) {
        entry |= squares[w] > p_.limit ? 0U : 1U << (28 + w);
      }
      entry |= entry != 0 ? static_cast<uint32_t>(run) : 0U;
    }
    const unsigned near = __ballot_sync(~0U, entry != 0 ? 1 : 0);
    if (fast_lane() == 0) {
      near_.counts[fast_warp()] = __popc(near);
    }
    __syncthreads();
    int at = count;
    for (int w = 0; w < kThreads / 32; ++w) {
      at += w < fast_warp() ? near_.counts[w] : 0;
      count += near_.counts[w];
    }
    if (entry != 0) {
      near_.list[at + __popc(near & ((1U << fast_lane()) - 1))] = entry;
    }
    __syncthreads();
    return count;
  }

  const FastParams& p_;
  Near& near_;
  uint32_t tile_;
  int32_t chunk_;
  int32_t segment_;
  uint32_t image_;
};

}  // namespace pydense
