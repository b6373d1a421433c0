// SPDX-License-Identifier: Apache-2.0
// Cross-entropy of upsampled logits. A block goes down its rows of cells. Per strip of outputs it
// passes over the classes twice, a part of them in shared memory at a time: for the sums of powers,
// from which the losses follow, and for the gradient. What the fragments of a row of cells add to a
// logit is summed in the order of the fragments, and from one row of cells to the next in memory
// that is the block's own; what two blocks share is added by the second kernel.
#pragma once

#include "segmentation_head/cross_entropy_tile.cuh"

namespace pydense {

constexpr int kCrossEntropyThreads = 128;  // at most

__device__ __forceinline__ void add_partial(CrossEntropyPartial& sum,
                                            const CrossEntropyPartial& other) {
  sum.loss += other.loss;
  sum.weight += other.weight;
  sum.valid += other.valid;
  sum.correct += other.correct;
}

// In lane 0 the sum over the lanes of a warp.
__device__ __forceinline__ CrossEntropyPartial sum_of_warp(CrossEntropyPartial sum) {
  constexpr unsigned kAll = 0xFFFFFFFFU;
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) {
    const CrossEntropyPartial other = {
        __shfl_down_sync(kAll, sum.loss, step), __shfl_down_sync(kAll, sum.weight, step),
        __shfl_down_sync(kAll, sum.valid, step), __shfl_down_sync(kAll, sum.correct, step)};
    add_partial(sum, other);
  }
  return sum;
}

template <class T>
class CrossEntropyBlock {
  static constexpr int kRows = kFragmentRows<T>;
  static constexpr T kLn2 = 0.6931471805599453;

 public:
  __device__ CrossEntropyBlock(const CrossEntropyCudaArgs<T>& args, const CrossEntropyPlan& plan,
                               unsigned char* shared)
      : args_(args),
        plan_(plan),
        tile_(args, plan, shared),
        thread_(static_cast<int>(threadIdx.x)),
        classes_(static_cast<int>(args.logits.classes)),
        smooth_(args.smoothing > 0) {}

  __device__ void run() {
    // More than one only where cells are wide, or where rounding gives one of them an output more.
    const int step = plan_.fragments;
    int batches = 1;
    while (__syncthreads_or(tile_.begin + batches * step < tile_.end) != 0) {
      ++batches;
    }
    for (int i = tile_.row_begin; i < tile_.row_end; ++i) {
      const int begin = tile_.first_rows[i - tile_.row_begin];
      const int end = tile_.first_rows[i - tile_.row_begin + 1];
      row_ = i;
      if (begin < end) {
        lower_row_ = static_cast<int>(portable::axis_taps(args_.axes.y, int64_t{begin}).i1);
      }
      for (int y = begin; y < end; y += kRows) {
        for (int batch = 0; batch < batches; ++batch) {
          strip(y, min(end - y, kRows), tile_.begin + batch * step);
        }
      }
      if (args_.gradient != nullptr && untouched_) {
        tile_.zero_row(i);
      }
      untouched_ = lower_untouched_;
      lower_untouched_ = true;
    }
    if (args_.gradient != nullptr && untouched_ && tile_.row_end < args_.logits.height) {
      tile_.zero_row(tile_.row_end);
    }
    finish();
  }

 private:
  // Rows [y, y + rows) of column x, which lies in this thread's cell or behind it.
  __device__ __forceinline__ void strip(int y, int rows, int x) {
    Fragment<T> pixels;
    rows = x < tile_.end ? rows : 0;
    const bool live = read_pixels(pixels, y, rows, x);
    if (__syncthreads_or(live) == 0) {
      for (int r = 0; args_.loss != nullptr && r < rows; ++r) {
        *loss_at(y + r, x) = 0;
      }
      return;
    }
    read_taps(pixels, y, rows, x);
    const Corners<T> corners = tile_.corners(row_, lower_row_);
    const T class_weights = add_classes(pixels, corners);

    const T hit = static_cast<T>(1 - args_.smoothing);
    const T miss = static_cast<T>(args_.smoothing / classes_);
    T loss_sum = 0;
    T to_upper[kRows];
    T to_lower[kRows];
    T misses[2] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int label = pixels.label[r];
      const T factor = label >= 0 ? factor_at(y + r, x) : T{};
      const T pixel_hit = label >= 0 ? hit * weight_of(label, factor) : T{};
      const T pixel_miss = factor * miss;
      const T all = fma(pixel_miss, class_weights, pixel_hit);
      // The sum is 0 where all logits are minus infinity.
      const T sum = pixels.sum[r] == 0 ? kNan<T> : pixels.sum[r];
      const T log_sum = log2(sum);
      T loss = pixel_hit * ((pixels.largest[r] - pixels.target[r]) + log_sum);
      if (smooth_) {
        loss = fma(pixel_miss, fma(class_weights, log_sum, -pixels.rest[r]), loss);
      }
      // Where the pixel has no weight, its NaN or infinity is not asked for.
      loss = all == 0 && pixel_hit == 0 ? T{} : loss * kLn2;
      T scale = all == 0 ? T{} : all / sum;
      if (label == kNoClass) {
        loss = scale = kNan<T>;
      }
      // Without the log2(e) in the weights of the rows.
      to_upper[r] = scale * (kLn2 * pixels.upper[r]);
      to_lower[r] = scale * (kLn2 * pixels.lower[r]);
      misses[0] = fma(pixel_miss, kLn2 * pixels.upper[r], misses[0]);
      misses[1] = fma(pixel_miss, kLn2 * pixels.lower[r], misses[1]);
      loss_sum += loss;
      if (args_.loss != nullptr && r < rows) {
        *loss_at(y + r, x) = loss;
      }
    }
    sums_.loss += static_cast<double>(loss_sum);
    if (args_.gradient != nullptr) {
      fall(pixels, corners, to_upper, to_lower, misses, y, x);
    }
  }

  // Labels and weights, and what they add to the sums. False where no pixel asks for anything.
  __device__ __forceinline__ bool read_pixels(Fragment<T>& pixels, int y, int rows, int x) {
    const int64_t offset = tile_.image * args_.target_strides[0] + y * args_.target_strides[1] +
                           x * args_.target_strides[2];
    switch (args_.target_type) {
      case IntegerType::kUInt8:
        read_labels(static_cast<const uint8_t*>(args_.target) + offset, rows, pixels);
        break;
      case IntegerType::kInt8:
        read_labels(static_cast<const int8_t*>(args_.target) + offset, rows, pixels);
        break;
      case IntegerType::kInt16:
        read_labels(static_cast<const int16_t*>(args_.target) + offset, rows, pixels);
        break;
      case IntegerType::kInt32:
        read_labels(static_cast<const int32_t*>(args_.target) + offset, rows, pixels);
        break;
      default:
        read_labels(static_cast<const int64_t*>(args_.target) + offset, rows, pixels);
    }
    bool live = false;
    T weights = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int label = pixels.label[r];
      const T factor = label >= 0 ? factor_at(y + r, x) : T{};
      weights += label >= 0 ? weight_of(label, factor) : T{};
      sums_.valid += label != kIgnored ? 1 : 0;
      live = live || label == kNoClass || factor != 0 || (label >= 0 && args_.count_correct);
    }
    sums_.weight += static_cast<double>(weights);
    return live;
  }

  template <class L>
  __device__ __forceinline__ void read_labels(const L* from, int rows, Fragment<T>& pixels) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      pixels.label[r] = kIgnored;
      if (r < rows) {
        const int64_t label = __ldg(from + r * args_.target_strides[1]);
        const int known = label >= 0 && label < classes_ ? static_cast<int>(label) : kNoClass;
        pixels.label[r] = label == args_.ignore_index ? kIgnored : known;
      }
    }
  }

  // The pixel's own weight.
  __device__ __forceinline__ T factor_at(int y, int x) const {
    const int64_t* const strides = args_.pixel_weight_strides;
    return args_.pixel_weight == nullptr ? T{1}
                                         : __ldg(args_.pixel_weight + tile_.image * strides[0] +
                                                 y * strides[1] + x * strides[2]);
  }

  __device__ __forceinline__ T weight_of(int label, T factor) const {
    return args_.weight == nullptr ? factor : factor * __ldg(args_.weight + label);
  }

  __device__ __forceinline__ void read_taps(Fragment<T>& pixels, int y, int rows, int x) const {
    constexpr T kLog2E = 1.4426950408889634;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const AxisTaps<T> taps = portable::axis_taps(args_.axes.y, int64_t{y} + r);
      pixels.upper[r] = taps.w0 * kLog2E;
      pixels.lower[r] = taps.w1 * kLog2E;
    }
    const AxisTaps<T> taps = portable::axis_taps(args_.axes.x, int64_t{x});
    pixels.left = rows > 0 ? taps.w0 : T{};
    pixels.right = rows > 0 ? taps.w1 : T{};
  }

  __device__ __forceinline__ T* loss_at(int y, int x) const {
    return args_.loss + (tile_.image * args_.axes.y.out_size + y) * args_.axes.x.out_size + x;
  }

  // Class weights of a group, 1 where there are none and 0 past the last.
  __device__ __forceinline__ Quad<T> class_weights(int first) const {
    Quad<T> weights;
#pragma unroll
    for (int g = 0; g < kClassGroup; ++g) {
      const T weight =
          args_.weight == nullptr || first + g >= classes_ ? T{1} : __ldg(args_.weight + first + g);
      weights.v[g] = first + g < classes_ ? weight : T{};
    }
    return weights;
  }

  // The first pass. Returns the sum of the class weights where they are needed.
  __device__ __forceinline__ T add_classes(Fragment<T>& pixels, const Corners<T>& corners) {
    pixels.start();
    T total = 0;
    for (int first = 0; first < classes_; first += plan_.chunk) {
      const int count = min(plan_.chunk, classes_ - first);
      tile_.stage(row_, lower_row_, first, count);
#pragma unroll 1
      for (int k = 0; k < count; k += kClassGroup) {
        Quad<T> weights = {};
        if (smooth_) {
          weights = class_weights(first + k);
        }
        if (k + kClassGroup <= count) {
          pixels.template add<false>(corners, k, first + k, kClassGroup, smooth_, weights, total);
        } else {
          pixels.template add<true>(corners, k, first + k, count - k, smooth_, weights, total);
        }
        if (smooth_) {
          total += (weights.v[0] + weights.v[1]) + (weights.v[2] + weights.v[3]);
        }
      }
    }
    if (args_.count_correct) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // As for torch.argmax, NaN is the largest.
        const bool correct = pixels.sum[r] == pixels.sum[r] ? pixels.target[r] == pixels.largest[r]
                                                            : (pixels.first_bad >> r & 1) != 0;
        sums_.correct += pixels.label[r] >= 0 && correct ? 1 : 0;
      }
    }
    return total;
  }

  // The second pass: group by group, fragments leave their sums in shared memory, and threads
  // collect them for the logits.
  __device__ __forceinline__ void fall(const Fragment<T>& pixels, const Corners<T>& corners,
                                       const T (&to_upper)[kRows], const T (&to_lower)[kRows],
                                       const T (&misses)[2], int y, int x) {
    int buffer = 0;
    for (int first = 0; first < classes_; first += plan_.chunk) {
      const int count = min(plan_.chunk, classes_ - first);
      tile_.stage(row_, lower_row_, first, count);
#pragma unroll 1
      for (int k = 0; k < count; k += kClassGroup) {
        Quad<T> weights = {};
        if (smooth_) {
          weights = class_weights(first + k);
        }
        Quad<T> sums[4];
        pixels.fall(corners, k, to_upper, to_lower, smooth_, weights, misses, sums);
        const int group = plan_.threads * kClassGroup;
        T* const falls = tile_.falls + buffer * 4 * group;
        T* const own = falls + thread_ * kClassGroup;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          store_quad(own + q * group, sums[q]);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int at = pixels.label[r] - (first + k);
          if (at >= 0 && at < kClassGroup) {
            const T hit = static_cast<T>(1 - args_.smoothing) *
                          weight_of(pixels.label[r], factor_at(y + r, x));
            const T above = hit * (kLn2 * pixels.upper[r]);
            const T below = hit * (kLn2 * pixels.lower[r]);
            own[at] -= pixels.left * above;
            own[group + at] -= pixels.right * above;
            own[2 * group + at] -= pixels.left * below;
            own[3 * group + at] -= pixels.right * below;
          }
        }
        __syncthreads();
        collect(falls, first + k);
        buffer ^= 1;  // what is collected now is written again after another barrier
      }
    }
    untouched_ = false;
    lower_untouched_ = lower_untouched_ && lower_row_ == row_;
  }

  // Adds what the fragments left for classes `first` and following to the logits' gradients.
  __device__ __forceinline__ void collect(const T* falls, int first) {
    const int positions = tile_.cells + 1;
    const bool one_row = lower_row_ == row_;
    const int items = one_row ? positions : 2 * positions;
#pragma unroll 1
    for (int item = thread_; item < items; item += static_cast<int>(blockDim.x)) {
      const int half = item >= positions ? 1 : 0;
      const int position = item - half * positions;
      const int column = tile_.first_cell - 1 + position;
      if (column < 0 || column >= args_.logits.width) {
        continue;
      }
      Quad<T> sum = {};
#pragma unroll 1
      for (int cell = max(position - 2, 0); cell <= min(position, tile_.cells - 1); ++cell) {
        if (tile_.left_of(cell) == position) {
          add_cell(falls, 2 * half, cell, sum);
          if (one_row) {
            add_cell(falls, 2, cell, sum);
          }
        }
        if (tile_.right_of(cell) == position) {
          add_cell(falls, 2 * half + 1, cell, sum);
          if (one_row) {
            add_cell(falls, 3, cell, sum);
          }
        }
      }
      const bool fresh = half == 0 ? untouched_ : lower_untouched_;
      const typename CrossEntropyTile<T>::Place to =
          tile_.place(half == 0 ? row_ : lower_row_, position);
#pragma unroll
      for (int g = 0; g < kClassGroup; ++g) {
        if (first + g < classes_) {
          T* const at = to.at + (first + g) * to.stride;
          *at = fresh ? sum.v[g] : *at + sum.v[g];
        }
      }
    }
  }

  __device__ __forceinline__ void add_cell(const T* falls, int corner, int cell,
                                           Quad<T>& sum) const {
    const T* from = falls + (corner * plan_.threads + cell * plan_.fragments) * kClassGroup;
#pragma unroll 2
    for (int f = 0; f < plan_.fragments; ++f) {
      const Quad<T> quad = load_quad(from + f * kClassGroup);
#pragma unroll
      for (int g = 0; g < kClassGroup; ++g) {
        sum.v[g] += quad.v[g];
      }
    }
  }

  // The sums of the block, in the order of lanes and warps.
  __device__ __forceinline__ void finish() {
    __shared__ CrossEntropyPartial warps[kCrossEntropyThreads / 32];
    const CrossEntropyPartial sum = sum_of_warp(sums_);
    if (thread_ % 32 == 0) {
      warps[thread_ / 32] = sum;
    }
    __syncthreads();
    if (thread_ == 0) {
      CrossEntropyPartial total = warps[0];
      for (int w = 1; w < plan_.threads / 32; ++w) {
        add_partial(total, warps[w]);
      }
      args_.partials[blockIdx.x] = total;
    }
  }

  const CrossEntropyCudaArgs<T>& args_;
  const CrossEntropyPlan& plan_;
  CrossEntropyTile<T> tile_;
  int thread_;
  int classes_;
  bool smooth_;
  int row_ = 0;  // of logits, over the strip
  int lower_row_ = 0;
  bool untouched_ = true;  // nothing was written for the row
  bool lower_untouched_ = true;
  CrossEntropyPartial sums_ = {};
};

}  // namespace pydense
