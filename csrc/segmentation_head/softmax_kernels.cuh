// SPDX-License-Identifier: Apache-2.0
// Softmax of upsampled logits, and the sum over sliding windows. The logits in shared memory are
// gone through for the largest class, for the sum and for the result: no probability is stored
// before it is final. Threads lie along the columns of the result, or along its classes where these
// are side by side in memory.
#pragma once

#include "segmentation_head/head_tile.cuh"
#include "segmentation_head/segmentation_head_cuda.h"

namespace pydense {

// Two numbers for each output of a strip.
template <class T>
struct PixelShared {
  T first[kStripRows][kHeadColumns];
  T second[kStripRows][kHeadColumns];
};

// The largest class of a thread's column of a strip; a NaN is passed over.
template <int Rows, class S, class T>
__device__ __forceinline__ void find_largest(HeadTile<S>& tile, const HeadStrip& strip,
                                             const T (&upper)[Rows], const T (&lower)[Rows],
                                             T (&largest)[Rows]) {
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    largest[r] = -INFINITY;
  }
  tile.for_each_class(strip, true, [&](int /*c*/, T top, T bottom) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const T value = fma(lower[r], bottom, upper[r] * top);
      largest[r] = value > largest[r] ? value : largest[r];
    }
  });
}

template <int Rows, class S>
__device__ __forceinline__ void softmax_of_strip(const UpsampleSoftmaxCudaArgs<Accumulate<S>>& args,
                                                 HeadTile<S>& tile, const HeadStrip& strip,
                                                 PixelShared<Accumulate<S>>& pixels) {
  using T = Accumulate<S>;
  T upper[Rows];
  T lower[Rows];
  tile.row_weights(strip, upper, lower);
  T largest[Rows];
  find_largest(tile, strip, upper, lower, largest);
  T scale[Rows] = {};  // the sum at first; NaN where a class is
  tile.for_each_class(strip, true, [&](int /*c*/, T top, T bottom) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      scale[r] += exp(fma(lower[r], bottom, upper[r] * top) - largest[r]);
    }
  });
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    scale[r] = T{1} / scale[r];
  }
  const HeadOutputs& at = tile.outputs();
  const int thread = static_cast<int>(threadIdx.x);
  S* const out = static_cast<S*>(args.out) + at.image * args.strides[0] +
                 (at.first_row + strip.row) * args.strides[2] + at.first_column * args.strides[3];
  if (args.strides[1] == 1 && args.strides[3] != 1) {
    __syncthreads();  // until the strip before has been written
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      pixels.first[r][thread] = largest[r];
      pixels.second[r][thread] = scale[r];
    }
    __syncthreads();
    tile.for_each_class_and_column(strip, [&](int c, int column, T top, T bottom) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const T value = fma(lower[r], bottom, upper[r] * top);
        out[r * args.strides[2] + column * args.strides[3] + c] =
            from_accumulate<S>(exp(value - pixels.first[r][column]) * pixels.second[r][column]);
      }
    });
    return;
  }
  S* const to = out + thread * args.strides[3];
  tile.for_each_class(strip, tile.is_inside(), [&](int c, T top, T bottom) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const T value = fma(lower[r], bottom, upper[r] * top);
      to[r * args.strides[2] + c * args.strides[1]] =
          from_accumulate<S>(exp(value - largest[r]) * scale[r]);
    }
  });
}

template <class S>
__global__ __launch_bounds__(kHeadColumns, kHeadBlocks<Accumulate<S>>) void upsample_softmax_kernel(
    UpsampleSoftmaxCudaArgs<Accumulate<S>> args, int64_t blocks) {
  __shared__ HeadShared<Accumulate<S>> shared;
  [[maybe_unused]] __shared__ PixelShared<Accumulate<S>> pixels;  // GCC overlooks uses in lambdas
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    HeadTile<S> tile(args.logits, args.axes, head_outputs(args.axes, block), 0,
                     static_cast<int>(args.logits.classes), shared);
    tile.share_columns();
    tile.for_each_strip([&](const HeadStrip& strip) {
      with_strip_rows(strip.rows, [&](auto rows) {
        softmax_of_strip<decltype(rows)::value>(args, tile, strip, pixels);
      });
    });
  }
}

// ---- the sum over sliding windows ----

constexpr int kAccumulateClasses = 32;  // of a block: classes have nothing to do with each other

template <int Rows, class S>
__device__ __forceinline__ void accumulate_strip(
    const UpsampleAccumulateCudaArgs<Accumulate<S>>& args, HeadTile<S>& tile,
    const HeadStrip& strip, PixelShared<Accumulate<S>>& pixels) {
  using T = Accumulate<S>;
  T upper[Rows];
  T lower[Rows];
  tile.row_weights(strip, upper, lower);
  const HeadOutputs& at = tile.outputs();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_row = at.first_row + strip.row;
  T weight[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    weight[r] = tile.is_inside() ? args.weight[(first_row + r) * args.weight_strides[0] +
                                               (at.first_column + thread) * args.weight_strides[1]]
                                 : T{};
  }
  T* const out = args.out + at.image * args.strides[0] + first_row * args.strides[2] +
                 at.first_column * args.strides[3];
  if (args.strides[1] == 1 && args.strides[3] != 1) {
    __syncthreads();  // until the strip before has been written
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      pixels.first[r][thread] = weight[r];
    }
    __syncthreads();
    tile.for_each_class_and_column(strip, [&](int c, int column, T top, T bottom) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        T& to = out[r * args.strides[2] + column * args.strides[3] + c];
        to = fma(fma(lower[r], bottom, upper[r] * top), pixels.first[r][column], to);
      }
    });
    return;
  }
  T* const to = out + thread * args.strides[3];
  tile.for_each_class(strip, tile.is_inside(), [&](int c, T top, T bottom) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      T& sum = to[r * args.strides[2] + c * args.strides[1]];
      sum = fma(fma(lower[r], bottom, upper[r] * top), weight[r], sum);
    }
  });
}

template <class S>
__global__
__launch_bounds__(kHeadColumns, kHeadBlocks<Accumulate<S>>) void upsample_accumulate_kernel(
    UpsampleAccumulateCudaArgs<Accumulate<S>> args, int64_t blocks) {
  __shared__ HeadShared<Accumulate<S>> shared;
  [[maybe_unused]] __shared__ PixelShared<Accumulate<S>> pixels;  // GCC overlooks uses in lambdas
  const int classes = static_cast<int>(args.logits.classes);
  const int64_t groups = pieces(classes, kAccumulateClasses);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int first = static_cast<int>(block % groups) * kAccumulateClasses;
    HeadTile<S> tile(args.logits, args.axes, head_outputs(args.axes, block / groups), first,
                     min(classes, first + kAccumulateClasses), shared);
    tile.share_columns();
    tile.for_each_strip([&](const HeadStrip& strip) {
      with_strip_rows(strip.rows, [&](auto rows) {
        accumulate_strip<decltype(rows)::value>(args, tile, strip, pixels);
      });
    });
  }
}

}  // namespace pydense
