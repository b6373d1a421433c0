// SPDX-License-Identifier: Apache-2.0
// Labels. Where columns of logits serve several outputs each, their own labels are found first: a
// warp whose cells all have four finite corners of one label needs no more, since weights that are
// not negative and rounding that is monotone keep the order of the classes.
#pragma once

#include "segmentation_head/head_tile.cuh"
#include "segmentation_head/segmentation_head_cuda.h"

namespace pydense {

constexpr int kNotFinite = -1;

// The first of the largest; a NaN is larger than all numbers, and the first NaN the largest.
template <class T>
__device__ __forceinline__ bool is_larger(T value, T best) {
  return !(value <= best) && best == best;
}

template <class S>
class ArgmaxBlock {
 public:
  using T = Accumulate<S>;

  __device__ ArgmaxBlock(const UpsampleArgmaxCudaArgs<T>& args, int64_t block,
                         HeadShared<T>& shared, int* corner_labels)
      : args_(args),
        tile_(args.logits, args.axes, head_outputs(args.axes, block), 0,
              static_cast<int>(args.logits.classes), shared),
        corner_labels_(corner_labels) {}

  __device__ void run() {
    // A thread for each corner; where there are more, few outputs would be spared.
    const bool corners = args_.confidence == nullptr && 2 * tile_.slots() <= kHeadColumns;
    tile_.for_each_strip([&](const HeadStrip& strip) {
      int label = kNotFinite;
      if (corners) {
        label = label_of_corners(strip);
        if (__syncthreads_and(label != kNotFinite)) {
          put_labels(strip, label);
          return;
        }
      }
      // Whole warps: what they skip is saved.
      const bool skip = __all_sync(0xFFFFFFFFU, label != kNotFinite);
      with_strip_rows(strip.rows, [&](auto rows) { compare<decltype(rows)::value>(strip, skip); });
      if (skip) {
        put_labels(strip, label);
      }
    });
  }

 private:
  // That of the four corners of this thread's cell, kNotFinite where they differ or are not finite.
  __device__ __forceinline__ int label_of_corners(const HeadStrip& strip) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool mine = thread < 2 * tile_.slots();
    T best = -INFINITY;
    T finite = 0;
    int label = 0;
    tile_.for_each_part(strip, [&](int first, int count) {
      const T* const values = tile_.at(thread);
      for (int c = 0; mine && c < count; ++c) {
        const T value = values[c];
        finite = fma(value, T{0}, finite);
        label = value > best ? first + c : label;
        best = value > best ? value : best;
      }
    });
    if (mine) {
      corner_labels_[thread] = finite == 0 ? label : kNotFinite;
    }
    __syncthreads();
    const int* const below = corner_labels_ + tile_.slots();
    label = corner_labels_[tile_.left()];
    return label == corner_labels_[tile_.right()] && label == below[tile_.left()] &&
                   label == below[tile_.right()]
               ? label
               : kNotFinite;
  }

  template <int Rows>
  __device__ __forceinline__ void compare(const HeadStrip& strip, bool skip) {
    T upper[Rows];
    T lower[Rows];
    tile_.row_weights(strip, upper, lower);
    T best[Rows];
    int label[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      best[r] = -INFINITY;
      label[r] = 0;
    }
    tile_.for_each_class(strip, !skip, [&](int c, T top, T bottom) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const T value = fma(lower[r], bottom, upper[r] * top);
        const bool larger = is_larger(value, best[r]);
        best[r] = larger ? value : best[r];
        label[r] = larger ? c : label[r];
      }
    });
    if (!skip) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        put_label(strip.row + r, label[r]);
      }
    }
    if (args_.confidence != nullptr) {
      T sum[Rows] = {};
      tile_.for_each_class(strip, true, [&](int /*c*/, T top, T bottom) {
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          sum[r] += exp(fma(lower[r], bottom, upper[r] * top) - best[r]);
        }
      });
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        if (tile_.is_inside()) {
          args_.confidence[place(strip.row + r)] = T{1} / sum[r];
        }
      }
    }
  }

  __device__ int64_t place(int row) const {
    const HeadOutputs& at = tile_.outputs();
    return (at.image * args_.axes.y.out_size + at.first_row + row) * args_.axes.x.out_size +
           at.first_column + static_cast<int>(threadIdx.x);
  }
  __device__ void put_labels(const HeadStrip& strip, int label) const {
    for (int r = 0; r < strip.rows; ++r) {
      put_label(strip.row + r, label);
    }
  }
  __device__ void put_label(int row, int label) const {
    if (!tile_.is_inside()) {
      return;
    }
    switch (args_.label_type) {
      case IntegerType::kUInt8:
        static_cast<uint8_t*>(args_.labels)[place(row)] = static_cast<uint8_t>(label);
        break;
      case IntegerType::kInt32:
        static_cast<int32_t*>(args_.labels)[place(row)] = label;
        break;
      default:
        static_cast<int64_t*>(args_.labels)[place(row)] = label;
        break;
    }
  }

  const UpsampleArgmaxCudaArgs<T>& args_;
  HeadTile<S> tile_;
  int* corner_labels_;
};

template <class S>
__global__ __launch_bounds__(kHeadColumns, kHeadBlocks<Accumulate<S>>) void upsample_argmax_kernel(
    UpsampleArgmaxCudaArgs<Accumulate<S>> args, int64_t blocks) {
  __shared__ HeadShared<Accumulate<S>> shared;
  __shared__ int corner_labels[kHeadColumns];
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    ArgmaxBlock<S>(args, block, shared, corner_labels).run();
  }
}

}  // namespace pydense
