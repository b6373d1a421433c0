// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "segmentation_head/cross_entropy_block.cuh"

namespace pydense {

constexpr int kFinishThreads = 256;

template <class T>
__global__ __launch_bounds__(kCrossEntropyThreads, 2) void cross_entropy_kernel(
    const __grid_constant__ CrossEntropyCudaArgs<T> args,
    const __grid_constant__ CrossEntropyPlan plan) {
  PYDENSE_DYNAMIC_SHARED(unsigned char, shared);
  CrossEntropyBlock<T>(args, plan, shared).run();
}

// Adds to the gradient of a logit what the tiles above and to the left have for it.
template <class T>
__device__ __forceinline__ void add_halo(const CrossEntropyCudaArgs<T>& args,
                                         const CrossEntropyPlan& plan, int64_t image, int64_t c,
                                         int64_t y, int64_t x) {
  const LogitsView& logits = args.logits;
  const bool first_row = y > 0 && y % plan.rows == 0;
  const bool first_column = x + 1 > 1 && (x + 1) % plan.cells == 0;
  const int64_t tile_y = y / plan.rows;
  const int64_t tile_x = (x + 1) / plan.cells;
  const int64_t above = image * logits.classes;
  T* const at =
      args.gradient + (args.gradient_channels_last
                           ? ((image * logits.height + y) * logits.width + x) * logits.classes + c
                           : ((above + c) * logits.height + y) * logits.width + x);
  T sum = *at;
  if (first_row) {
    sum +=
        args.halo[args.gradient_channels_last
                      ? ((image * plan.tiles_y + tile_y - 1) * logits.width + x) * logits.classes +
                            c
                      : ((above + c) * plan.tiles_y + tile_y - 1) * logits.width + x];
  }
  if (first_column) {
    const int64_t rows = plan.rows + 1;
    const T* const columns =
        args.halo + plan.halo_rows +
        ((image * plan.tiles_x + tile_x - 1) * plan.tiles_y * rows) * logits.classes + c;
    sum += columns[(tile_y * rows + y % plan.rows) * logits.classes];
    if (first_row) {
      sum += columns[((tile_y - 1) * rows + plan.rows) * logits.classes];
    }
  }
  *at = sum;
}

// The sums of all blocks, by the first block, and the gradients that tiles share, by the others.
template <class T>
__global__ __launch_bounds__(kFinishThreads) void cross_entropy_finish_kernel(
    const __grid_constant__ CrossEntropyCudaArgs<T> args,
    const __grid_constant__ CrossEntropyPlan plan) {
  const LogitsView& logits = args.logits;
  if (blockIdx.x > 0) {
    // First the first rows of the tiles, then the other rows of their first columns.
    const int64_t in_rows = logits.images * (plan.tiles_y - 1) * logits.classes * logits.width;
    const int64_t in_columns = logits.images * (plan.tiles_x - 1) * logits.classes * logits.height;
    const int64_t stride = int64_t{gridDim.x - 1} * kFinishThreads;
    for (int64_t i = int64_t{blockIdx.x - 1} * kFinishThreads + threadIdx.x;
         i < in_rows + in_columns; i += stride) {
      const bool row = i < in_rows;
      // Side by side in memory: columns, or classes where the gradient or the halo has them so.
      const bool classes_first = args.gradient_channels_last || !row;
      const int64_t lines = row ? logits.width : logits.height;
      int64_t rest = row ? i : i - in_rows;
      const int64_t inner = classes_first ? logits.classes : lines;
      const int64_t a = rest % inner;
      rest /= inner;
      const int64_t outer = classes_first ? lines : logits.classes;
      const int64_t b = rest % outer;
      rest /= outer;
      const int64_t c = classes_first ? a : b;
      const int64_t line = classes_first ? b : a;
      const int64_t tiles = (row ? plan.tiles_y : plan.tiles_x) - 1;
      const int64_t tile = rest % tiles + 1;
      const int64_t y = row ? tile * plan.rows : line;
      const int64_t x = row ? line : tile * plan.cells - 1;
      if (row || y == 0 || y % plan.rows != 0) {
        add_halo(args, plan, rest / tiles, c, y, x);
      }
    }
    return;
  }
  __shared__ CrossEntropyPartial warps[kFinishThreads / 32];
  CrossEntropyPartial sum = {};
  for (int64_t i = threadIdx.x; i < plan.blocks; i += kFinishThreads) {
    add_partial(sum, args.partials[i]);
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kFinishThreads / 32; ++w) {
      add_partial(sum, warps[w]);
    }
    const double pixels = static_cast<double>(logits.images) *
                          static_cast<double>(args.axes.y.out_size) *
                          static_cast<double>(args.axes.x.out_size);
    const double by = args.divisor == CrossEntropyDivisor::kWeight   ? sum.weight
                      : args.divisor == CrossEntropyDivisor::kPixels ? pixels
                                                                     : 1.0;
    *args.scale = by == 0 ? 0.0 : 1 / by;
    if (args.total != nullptr) {
      *args.total = static_cast<T>(sum.loss / by);
    }
    args.counts[0] = sum.correct;
    args.counts[1] = sum.valid;
  }
}

}  // namespace pydense
