// SPDX-License-Identifier: Apache-2.0
// Where a block of cross-entropy's kernel works: its cells, the logits at their corners in shared
// memory, and the places of their gradients.
#pragma once

#include "segmentation_head/cross_entropy_fragment.cuh"

namespace pydense {

// The first output whose upper tap is `row` or later.
template <class T>
__device__ __forceinline__ int first_output(const AxisMap<T>& map, int64_t row) {
  int64_t begin = 0;
  int64_t end = map.out_size;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (portable::axis_taps(map, middle).i0 < row) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return static_cast<int>(begin);
}

// The first output of a cell of columns: of cell 0, the outputs at and before the first column of
// logits; of cell 1, those after it and before the second.
template <class T>
__device__ __forceinline__ int first_output_of_cell(const AxisMap<T>& map, int64_t cell) {
  int64_t begin = 0;
  int64_t end = map.out_size;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    const AxisTaps<T> taps = portable::axis_taps(map, middle);
    const int64_t found = taps.i0 == 0 && taps.w1 == 0 ? 0 : taps.i0 + 1;
    if (found < cell) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return static_cast<int>(begin);
}

template <class T>
struct CrossEntropyTile {
  const CrossEntropyCudaArgs<T>& args;
  const CrossEntropyPlan& plan;
  int tile_x;
  int tile_y;
  int64_t image;
  int first_cell;
  int cells;
  int row_begin;  // rows of logits whose cells are the block's
  int row_end;
  T* values;           // [2, plan.cells + 1, plan.pitch], see stage()
  T* falls;            // [2, 4, plan.threads, kClassGroup], with a gradient
  int* first_columns;  // of the cells, and the end of the last
  int* first_rows;     // of the rows of cells
  int cell;            // of this thread,
  int begin;           // its column
  int end;             // and where the cell ends
  int held_even = -1;  // rows and first class in `values`
  int held_odd = -1;
  int held_class = -1;

  __device__ CrossEntropyTile(const CrossEntropyCudaArgs<T>& call, const CrossEntropyPlan& cut,
                              unsigned char* shared)
      : args(call), plan(cut) {
    const int64_t block = blockIdx.x;
    tile_x = static_cast<int>(block % plan.tiles_x);
    tile_y = static_cast<int>(block / plan.tiles_x % plan.tiles_y);
    image = block / plan.tiles_x / plan.tiles_y;
    first_cell = tile_x * plan.cells;
    cells = static_cast<int>(min(int64_t{plan.cells}, args.logits.width + 1 - first_cell));
    row_begin = tile_y * plan.rows;
    row_end = static_cast<int>(min(int64_t{row_begin} + plan.rows, args.logits.height));

    values = reinterpret_cast<T*>(shared);
    falls = values + 2 * (plan.cells + 1) * plan.pitch;
    T* const past = falls + (args.gradient != nullptr ? 2 * 4 * kClassGroup * plan.threads : 0);
    first_columns = reinterpret_cast<int*>(past);
    first_rows = first_columns + plan.cells + 1;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i <= cells; i += static_cast<int>(blockDim.x)) {
      first_columns[i] = first_output_of_cell(args.axes.x, int64_t{first_cell} + i);
    }
    for (int i = thread; i <= row_end - row_begin; i += static_cast<int>(blockDim.x)) {
      first_rows[i] = first_output(args.axes.y, int64_t{row_begin} + i);
    }
    __syncthreads();
    const bool owner = thread < cells * plan.fragments;
    cell = owner ? thread / plan.fragments : 0;
    begin = first_columns[cell] + thread % plan.fragments;
    end = owner ? first_columns[cell + 1] : 0;
  }

  // Columns of logits are counted from that before the block's first cell. What lies before the
  // first column of all has its weights from columns 1 and 2.
  __device__ __forceinline__ int left_of(int some_cell) const {
    return first_cell + some_cell == 0 ? 1 : some_cell;
  }
  __device__ __forceinline__ int right_of(int some_cell) const {
    const int left = left_of(some_cell);
    const bool single =
        args.axes.x.grid == AxisGrid::kIdentity || first_cell + left >= args.logits.width;
    return single ? left : left + 1;
  }

  __device__ __forceinline__ T* row_values(int row) const {
    return values + (row & 1) * (plan.cells + 1) * plan.pitch;
  }
  // Of this thread's cell, between two rows of logits.
  __device__ __forceinline__ Corners<T> corners(int upper, int lower) const {
    const int left = left_of(cell) * plan.pitch;
    const int right = right_of(cell) * plan.pitch;
    return {{row_values(upper) + left, row_values(upper) + right, row_values(lower) + left,
             row_values(lower) + right}};
  }

  // Where the block has its part of the gradient of a logit.
  struct Place {
    T* at;           // class 0
    int64_t stride;  // from class to class
  };
  __device__ __forceinline__ Place place(int row, int position) const {
    const LogitsView& logits = args.logits;
    if (position == plan.cells) {
      const int64_t rows = plan.tiles_y * (plan.rows + 1);
      const int64_t at =
          (image * plan.tiles_x + tile_x) * rows + tile_y * (plan.rows + 1) + (row - row_begin);
      return {args.halo + plan.halo_rows + at * logits.classes, 1};
    }
    const bool below = row == row_end;
    const int64_t height = below ? plan.tiles_y : logits.height;
    const int64_t y = below ? tile_y : row;
    const int64_t x = int64_t{first_cell} - 1 + position;
    T* const array = below ? args.halo : args.gradient;
    if (args.gradient_channels_last) {
      return {array + ((image * height + y) * logits.width + x) * logits.classes, 1};
    }
    const int64_t plane = height * logits.width;
    return {array + image * logits.classes * plane + y * logits.width + x, plane};
  }

  // The gradients of a row of logits that no output of the block reaches.
  __device__ __forceinline__ void zero_row(int row) const {
    for (int position = static_cast<int>(threadIdx.x); position <= cells;
         position += static_cast<int>(blockDim.x)) {
      const int column = first_cell - 1 + position;
      if (column >= 0 && column < args.logits.width) {
        const Place to = place(row, position);
        for (int64_t c = 0; c < args.logits.classes; ++c) {
          to.at[c * to.stride] = 0;
        }
      }
    }
  }

  // Brings classes of two rows of logits into shared memory; even rows into one half of it, odd
  // ones into the other, so that the lower row stays for the next row of cells.
  __device__ __forceinline__ void stage(int upper, int lower, int first, int count) {
    if (held_class != first) {
      held_even = held_odd = -1;
      held_class = first;
    }
    const bool has_upper = ((upper & 1) != 0 ? held_odd : held_even) == upper;
    const bool has_lower = lower == upper || ((lower & 1) != 0 ? held_odd : held_even) == lower;
    if (has_upper && has_lower) {
      return;
    }
    __syncthreads();  // until what was there has been read
    for (int part = has_upper ? 1 : 0; part < (has_lower ? 1 : 2); ++part) {
      copy_row(part == 0 ? upper : lower, first, count);
    }
    held_even = (upper & 1) == 0 ? upper : (lower & 1) == 0 ? lower : held_even;
    held_odd = (upper & 1) != 0 ? upper : (lower & 1) != 0 ? lower : held_odd;
    __syncthreads();
  }

  __device__ __forceinline__ void copy_row(int row, int first, int count) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (args.logits.type == FloatType::kBFloat16) {
        return copy_row_of<__nv_bfloat16>(row, first, count);
      }
      if (args.logits.type == FloatType::kFloat16) {
        return copy_row_of<__half>(row, first, count);
      }
    }
    copy_row_of<T>(row, first, count);
  }

  template <class S>
  __device__ __forceinline__ void copy_row_of(int row, int first, int count) const {
    const int64_t* const strides = args.logits.strides;
    const int64_t class_stride = strides[1];
    const int64_t column_stride = strides[3];
    const S* const from = static_cast<const S*>(args.logits.data) + image * strides[0] +
                          row * strides[2] + first * class_stride +
                          int64_t{first_cell - 1} * column_stride;
    T* const to = row_values(row);
    const int first_position = first_cell == 0 ? 1 : 0;
    const int positions = static_cast<int>(min(int64_t{cells}, args.logits.width - first_cell) + 1);
    const int warps = static_cast<int>(blockDim.x) / 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (class_stride == 1) {
      for (int position = first_position + warp; position < positions; position += warps) {
        for (int k = lane; k < count; k += 32) {
          to[position * plan.pitch + k] = to_accumulate(__ldg(from + position * column_stride + k));
        }
      }
      return;
    }
    for (int k = warp * kClassGroup; k < count; k += warps * kClassGroup) {
      for (int position = first_position + lane; position < positions; position += 32) {
        Quad<T> quad;
#pragma unroll
        for (int g = 0; g < kClassGroup; ++g) {
          const S* const at = from + position * column_stride + (k + g) * class_stride;
          quad.v[g] = k + g < count ? to_accumulate(__ldg(at)) : T{};
        }
        store_quad(to + position * plan.pitch + k, quad);
      }
    }
  }
};

}  // namespace pydense
