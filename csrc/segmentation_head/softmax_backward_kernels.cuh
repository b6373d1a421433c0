// SPDX-License-Identifier: Apache-2.0
// The gradient of softmax of upsampled logits. A block has the outputs between two rows of logits,
// as far as they lie between a tile of columns of logits. With p the softmax and g the gradient
// that comes in, p (g - sum of p g) falls onto the four logits round an output: vertically in
// registers, horizontally from shared memory, one thread for each logit in a fixed order. What a
// block finds for its two rows are parts; a second kernel adds those of neighbours, up to four for
// a logit, and no atomics are needed.
#pragma once

#include "segmentation_head/softmax_kernels.cuh"

namespace pydense {

constexpr int kFallClasses = 4;  // in shared memory at a time
template <class S>
constexpr int kBackwardBlocks =
    kHeadBlocks<Accumulate<S>> - 1;  // whose registers take the room of one

// Cells (between two columns of logits) of a tile: as many as have about a block's columns of
// outputs. Those beyond the first and the last logit make the outer cells wider.
template <class T>
PYDENSE_HD int64_t cells_of_tile(const HeadAxes<T>& axes) {
  const int64_t cells = kHeadColumns * axes.x.in_size / axes.x.out_size - 1;
  return cells < 1 ? 1 : cells < kHeadColumns - 1 ? cells : kHeadColumns - 1;
}

// parts is [images, height, tiles, 2 rows, classes, cells + 1].
template <class T>
PYDENSE_HD int64_t parts_of_block(const LogitsView& logits, const HeadAxes<T>& axes) {
  return 2 * logits.classes * (cells_of_tile(axes) + 1);
}
template <class T>
PYDENSE_HD int64_t backward_blocks(const LogitsView& logits, const HeadAxes<T>& axes) {
  return logits.images * logits.height * pieces(logits.width, cells_of_tile(axes));
}

// The first output whose upper or left tap is input i or a later one.
template <class T>
__device__ __forceinline__ int64_t first_output(const AxisMap<T>& map, int64_t i) {
  int64_t y = portable::estimate_output(map, static_cast<double>(i));
  while (y > 0 && portable::axis_taps(map, y - 1).i0 >= i) {
    --y;
  }
  while (y < map.out_size && portable::axis_taps(map, y).i0 < i) {
    ++y;
  }
  return y;
}

template <class T>
struct FallShared {
  T rows[2][kFallClasses][kHeadColumns];
  // The first column whose left, or right, tap is this slot or a later one.
  int first_column[2][kHeadColumns + 1];
  int64_t ends[4];
};

template <class S>
class SoftmaxBackwardBlock {
 public:
  using T = Accumulate<S>;

  __device__ SoftmaxBackwardBlock(const UpsampleSoftmaxBackwardCudaArgs<T>& args, int64_t block,
                                  HeadShared<T>& shared, FallShared<T>& falls)
      : args_(args), shared_(shared), falls_(falls), cells_(cells_of_tile(args.axes)) {
    const int64_t tiles = pieces(args.logits.width, cells_);
    image_ = block / tiles / args.logits.height;
    row_ = block / tiles % args.logits.height;
    first_cell_ = block % tiles * cells_;
    parts_ = args.parts + block * parts_of_block(args.logits, args.axes);
  }

  __device__ void run() {
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();  // until the block before, if any, is through
    if (thread < 4) {
      const bool vertical = thread < 2;
      const int64_t begin = vertical ? row_ : first_cell_;
      const int64_t cells = vertical ? 1 : cells_;
      falls_.ends[thread] = first_output(vertical ? args_.axes.y : args_.axes.x,
                                         begin + (thread % 2 == 0 ? 0 : cells));
    }
    const int64_t count = parts_of_block(args_.logits, args_.axes);
    for (int64_t i = thread; i < count; i += kHeadColumns) {
      parts_[i] = 0;
    }
    __syncthreads();
    for (int64_t y = falls_.ends[0]; y < falls_.ends[1]; y += kHeadRows) {
      for (int64_t x = falls_.ends[2]; x < falls_.ends[3]; x += kHeadColumns) {
        const HeadOutputs at = {image_, y, x,
                                static_cast<int>(min(int64_t{kHeadRows}, falls_.ends[1] - y)),
                                static_cast<int>(min(int64_t{kHeadColumns}, falls_.ends[3] - x))};
        HeadTile<S> tile(args_.logits, args_.axes, at, 0, static_cast<int>(args_.logits.classes),
                         shared_);
        tile.share_columns();
        __syncthreads();
        find_columns(tile);
        tile.for_each_strip([&](const HeadStrip& strip) {
          adds_ = y > falls_.ends[0] || x > falls_.ends[2] || strip.row > 0;
          with_strip_rows(strip.rows,
                          [&](auto rows) { strip_falls<decltype(rows)::value>(tile, strip); });
        });
      }
    }
  }

 private:
  __device__ void find_columns(const HeadTile<S>& tile) {
    for (int i = static_cast<int>(threadIdx.x); i <= tile.slots(); i += kHeadColumns) {
      for (int side = 0; side < 2; ++side) {
        int low = 0;
        int high = tile.outputs().columns;
        while (low < high) {
          const int middle = (low + high) / 2;
          if (shared_.column_taps[side][middle] < i) {
            low = middle + 1;
          } else {
            high = middle;
          }
        }
        falls_.first_column[side][i] = low;
      }
    }
  }

  template <int Rows>
  __device__ __forceinline__ void strip_falls(HeadTile<S>& tile, const HeadStrip& strip) {
    T upper[Rows];
    T lower[Rows];
    tile.row_weights(strip, upper, lower);
    T largest[Rows];
    find_largest(tile, strip, upper, lower, largest);
    const HeadOutputs& at = tile.outputs();
    const int thread = static_cast<int>(threadIdx.x);
    const S* const from = static_cast<const S*>(args_.full_gradient) + at.image * args_.strides[0] +
                          (at.first_row + strip.row) * args_.strides[2] +
                          (at.first_column + thread) * args_.strides[3];
    const auto gradient = [&](int r, int c) {
      return to_accumulate(__ldg(from + r * args_.strides[2] + c * args_.strides[1]));
    };
    T sum[Rows] = {};
    T mean[Rows] = {};
    tile.for_each_class(strip, tile.is_inside(), [&](int c, T top, T bottom) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const T power = exp(fma(lower[r], bottom, upper[r] * top) - largest[r]);
        sum[r] += power;
        mean[r] = fma(power, gradient(r, c), mean[r]);
      }
    });
    T scale[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      scale[r] = T{1} / sum[r];
      mean[r] = mean[r] / sum[r];
    }
    tile.for_each_part(strip, [&](int first, int count) {
      for (int begin = 0; begin < count; begin += kFallClasses) {
        const int classes = min(kFallClasses, count - begin);
        for (int k = 0; k < classes; ++k) {
          T top;
          T bottom;
          tile.rows_at(begin + k, top, bottom);
          T up = 0;
          T down = 0;
#pragma unroll
          for (int r = 0; r < Rows; ++r) {
            if (tile.is_inside()) {
              const T power = exp(fma(lower[r], bottom, upper[r] * top) - largest[r]) * scale[r];
              const T fall = power * (gradient(r, first + begin + k) - mean[r]);
              up = fma(upper[r], fall, up);
              down = fma(lower[r], fall, down);
            }
          }
          falls_.rows[0][k][thread] = up;
          falls_.rows[1][k][thread] = down;
        }
        __syncthreads();
        for_each_pair(tile.slots(), classes, [&](int slot, int k) {
          add_columns(tile, strip, slot, k, first + begin + k);
        });
        __syncthreads();
      }
    });
  }

  // Adds what falls onto one column of logits in both rows.
  __device__ __forceinline__ void add_columns(const HeadTile<S>& tile, const HeadStrip& strip,
                                              int slot, int k, int c) {
    T up = 0;
    T down = 0;
    for (int side = 0; side < 2; ++side) {
      const int end = falls_.first_column[side][slot + 1];
      for (int x = falls_.first_column[side][slot]; x < end; ++x) {
        const T weight = shared_.column_weights[side][x];
        up = fma(weight, falls_.rows[0][k][x], up);
        down = fma(weight, falls_.rows[1][k][x], down);
      }
    }
    const int64_t width = cells_ + 1;
    T* const to = parts_ + c * width + (tile.first_tap() - first_cell_) + slot;
    const bool is_last = strip.top == strip.bottom;  // both taps are the last row of logits
    up += is_last ? down : T{};
    to[0] = adds_ ? to[0] + up : up;
    if (!is_last) {
      T* const lower = to + args_.logits.classes * width;
      lower[0] = adds_ ? lower[0] + down : down;
    }
  }

  const UpsampleSoftmaxBackwardCudaArgs<T>& args_;
  HeadShared<T>& shared_;
  FallShared<T>& falls_;
  int64_t cells_;
  int64_t image_;
  int64_t row_;
  int64_t first_cell_;
  T* parts_;
  bool adds_ = false;  // to what earlier strips left
};

template <class S>
__global__
__launch_bounds__(kHeadColumns, kBackwardBlocks<S>) void upsample_softmax_backward_kernel(
    UpsampleSoftmaxBackwardCudaArgs<Accumulate<S>> args, int64_t blocks) {
  __shared__ HeadShared<Accumulate<S>> shared;
  __shared__ FallShared<Accumulate<S>> falls;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    SoftmaxBackwardBlock<S>(args, block, shared, falls).run();
  }
}

// A thread for each logit, in the order of the gradient in memory.
template <class T>
__global__ __launch_bounds__(kHeadColumns) void softmax_backward_sum_kernel(
    UpsampleSoftmaxBackwardCudaArgs<T> args, int64_t numbers) {
  const LogitsView& logits = args.logits;
  const int64_t cells = cells_of_tile(args.axes);
  const int64_t tiles = pieces(logits.width, cells);
  const int64_t size = parts_of_block(logits, args.axes);
  const int64_t step = int64_t{gridDim.x} * kHeadColumns;
  for (int64_t i = int64_t{blockIdx.x} * kHeadColumns + threadIdx.x; i < numbers; i += step) {
    int64_t rest = i;
    const auto next = [&](int64_t length) {
      const int64_t index = rest % length;
      rest /= length;
      return index;
    };
    int64_t c = args.gradient_channels_last ? next(logits.classes) : 0;
    const int64_t x = next(logits.width);
    const int64_t y = next(logits.height);
    c = args.gradient_channels_last ? c : next(logits.classes);
    const int64_t tile = x / cells;
    const int64_t slot = x % cells;
    // Of the cells below (row 0) and above (row 1) this logit, in a tile.
    const auto part = [&](int row, int64_t at_tile, int64_t at_slot) {
      const int64_t block = (rest * logits.height + y - row) * tiles + at_tile;
      return args.parts[block * size + (row * logits.classes + c) * (cells + 1) + at_slot];
    };
    T sum = part(0, tile, slot);
    sum += y > 0 ? part(1, tile, slot) : T{};
    if (slot == 0 && tile > 0) {
      sum += part(0, tile - 1, cells);
      sum += y > 0 ? part(1, tile - 1, cells) : T{};
    }
    args.gradient[i] = sum;
  }
}

}  // namespace pydense
