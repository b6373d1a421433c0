// SPDX-License-Identifier: Apache-2.0
// Forward on a GPU. A block makes a tile of the output, plane after plane. The taps of its rows and
// columns it works out once, into shared memory. Of each input it then spreads the rows that the
// tile needs to the tile's columns, once each, also into shared memory: an output is a weighted sum
// of two of those. Sums have the order of the CPU kernels, and so their bits.
//
// A row's elements are its columns or, for channels_last, the channels of all its pixels. An item
// is what shares its taps along x: a column, or a vector of channels.
#pragma once

#include "common/cuda.cuh"
#include "upsample/upsample.h"
#include "upsample/upsample_math.h"

namespace pydense {

constexpr int kForwardThreads = 256;
constexpr int kForwardRows = 4;  // of a thread

// Elements of a row that a thread makes, and that move in one access where memory allows it: 16
// bytes of shared memory.
template <class T>
constexpr int kForwardElements = 16 / sizeof(Accumulate<T>);

template <class T>
struct ForwardInput {
  const T* data;
  PictureStrides strides;
  AxisMap<Accumulate<T>> y;  // neither is used for an input of the output's size
  AxisMap<Accumulate<T>> x;
};

template <class T>
struct ForwardParams {
  int64_t planes;    // pictures of one channel, or of all for channels_last
  int64_t channels;  // planes of an image, or elements of a pixel
  int64_t height;
  int64_t row;  // elements
  uint32_t tiles_x;
  int32_t staged_rows;  // of an input, that a tile needs at most
  int32_t num_same;
  int32_t num_inputs;
  bool relu;
  T* out;
  ForwardInput<T> inputs[kMaxUpsampleInputs];  // those of the output's size first
};

// The taps of a tile in one input, in shared memory.
template <class A, class Offset>
struct ForwardTable {
  A* left_weight;  // [items]
  A* right_weight;
  A* upper_weight;  // [rows]
  A* lower_weight;
  Offset* left;  // [items], elements of the input's row; -1 where no input reaches the column
  Offset* right;
  int32_t* upper;  // [rows], of the staged rows; -1 where no input reaches the row
  int32_t* lower;
  int32_t* source;  // [staged], rows of the input
  int32_t* count;   // of staged rows

  PYDENSE_HD static int64_t bytes(int items, int rows, int staged) {
    const int64_t exact = 2 * int64_t{items + rows} * static_cast<int64_t>(sizeof(A)) +
                          2 * int64_t{items} * static_cast<int64_t>(sizeof(Offset)) +
                          (2 * int64_t{rows} + staged + 1) * static_cast<int64_t>(sizeof(int32_t));
    return (exact + 15) / 16 * 16;
  }
  __device__ __forceinline__ ForwardTable(unsigned char* memory, int items, int rows, int staged)
      : left_weight(reinterpret_cast<A*>(memory)),
        right_weight(left_weight + items),
        upper_weight(right_weight + items),
        lower_weight(upper_weight + rows),
        left(reinterpret_cast<Offset*>(lower_weight + rows)),
        right(left + items),
        upper(reinterpret_cast<int32_t*>(right + items)),
        lower(upper + rows),
        source(lower + rows),
        count(source + staged) {}

  // Item number `item` of the tile: column `column` of the output, `channel` in its pixel.
  __device__ __forceinline__ void set_item(int item, const AxisMap<A>& map, int64_t column,
                                           int64_t unit, int64_t channel) const {
    const AxisTaps<A> taps =
        portable::axis_taps(map, column < map.out_size ? column : map.out_size - 1);
    left_weight[item] = taps.w0;
    right_weight[item] = taps.w1;
    left[item] =
        static_cast<Offset>(portable::is_inside(map, taps) ? taps.i0 * unit + channel : -1);
    right[item] = static_cast<Offset>(taps.i1 * unit + channel);
  }

  // Row number `row` out of `rows` of the tile that begins at output `first`.
  __device__ __forceinline__ void set_row(int row, const AxisMap<A>& map, int64_t first, int rows,
                                          int staged) const {
    const int64_t end = first + rows < map.out_size ? first + rows : map.out_size;
    const int64_t y = first + row < end ? first + row : end - 1;
    const AxisTaps<A> taps = portable::axis_taps(map, y);
    const int64_t top = portable::axis_taps(map, first).i0;
    const int64_t bottom = portable::axis_taps(map, end - 1).i1;
    const int64_t base = top > 0 ? top : 0;
    const int64_t needed = (bottom < map.in_size ? bottom : map.in_size - 1) - base + 1;
    const bool inside = portable::is_inside(map, taps);
    upper_weight[row] = taps.w0;
    lower_weight[row] = taps.w1;
    if (needed <= staged) {
      upper[row] = inside ? static_cast<int32_t>(taps.i0 - base) : -1;
      lower[row] = static_cast<int32_t>(taps.i1 - base);
      for (int64_t i = row; i < needed; i += rows) {
        source[i] = static_cast<int32_t>(base + i);
      }
    } else {  // scaled down, with rows between that nobody needs
      upper[row] = inside ? 2 * row : -1;
      lower[row] = 2 * row + 1;
      source[2 * row] = static_cast<int32_t>(inside ? taps.i0 : 0);
      source[2 * row + 1] = static_cast<int32_t>(inside ? taps.i1 : 0);
    }
    if (row == 0) {
      *count = static_cast<int32_t>(needed <= staged ? (needed > 0 ? needed : 0) : 2 * rows);
    }
  }
};

template <class T, int kVector, bool kChannelsLast>
__global__ __launch_bounds__(kForwardThreads, kVector > 1 ? 3 : 2) void upsample_forward_kernel(
    const __grid_constant__ ForwardParams<T> p) {
  using A = Accumulate<T>;
  // Columns are counted in 32 bits, elements of all channels are not.
  using Offset = std::conditional_t<kChannelsLast, int64_t, int32_t>;
  using Table = ForwardTable<A, Offset>;
  constexpr int kElements = kForwardElements<T>;
  constexpr int kItem = kChannelsLast ? kVector : 1;  // elements of an item
  constexpr int kBatch = kElements / kItem;           // items at once, for loads to be in flight
  PYDENSE_DYNAMIC_SHARED(unsigned char, shared);

  const int width = static_cast<int>(blockDim.x);
  const int length = width * kElements;  // of the tile's rows
  const int items = length / kItem;      // a power of 2
  const int item_bits = __ffs(items) - 1;
  const int rows = static_cast<int>(blockDim.y) * kForwardRows;
  const int tx = static_cast<int>(threadIdx.x);
  const int ty = static_cast<int>(threadIdx.y);
  const int tz = static_cast<int>(threadIdx.z);
  const int64_t first = int64_t{blockIdx.x % p.tiles_x} * length;
  const int64_t first_row = int64_t{blockIdx.x / p.tiles_x} * rows;
  const int threads = width * static_cast<int>(blockDim.y);  // that share a plane
  const int thread = tx + width * ty;
  auto* const staged = reinterpret_cast<A*>(shared) + tz * p.staged_rows * length;
  unsigned char* const tables = shared + static_cast<int64_t>(sizeof(A)) * p.staged_rows * length *
                                             static_cast<int>(blockDim.z);
  const int64_t table_bytes = Table::bytes(items, rows, p.staged_rows);

  for (int k = p.num_same + tz; k < p.num_inputs; k += static_cast<int>(blockDim.z)) {
    const Table table(tables + (k - p.num_same) * table_bytes, items, rows, p.staged_rows);
    for (int i = thread; i < items + rows; i += threads) {
      if (i < rows) {
        table.set_row(i, p.inputs[k].y, first_row, rows, p.staged_rows);
      } else {
        const int64_t element = first + (i - rows) * kItem;
        const int64_t unit = kChannelsLast ? p.channels : 1;
        const int64_t column = kChannelsLast ? element / unit : element;
        table.set_item(i - rows, p.inputs[k].x, column, unit, element - column * unit);
      }
    }
  }
  __syncthreads();

  // What of the tile lies in the picture, from the thread's first row and element on.
  const int64_t y0 = first_row + int64_t{ty} * kForwardRows;
  const int64_t element0 = first + tx * kVector;
  const auto rows_left = static_cast<int>(min(p.height - y0, int64_t{kForwardRows}));
  const auto elements_left = static_cast<int>(min(p.row - element0, int64_t{length}));
  for (int64_t begin = int64_t{blockIdx.y} * blockDim.z; begin < p.planes;
       begin += int64_t{gridDim.y} * blockDim.z) {
    const int64_t plane = begin + tz;
    const int64_t batch = kChannelsLast ? plane : plane / p.channels;
    const int64_t channel = kChannelsLast ? 0 : plane - batch * p.channels;
    A sum[kForwardRows][kElements];
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sum[r][e] = -A{};  // -0 + x is x, a -0 included
      }
    }
    for (int k = 0; k < p.num_same; ++k) {
      const ForwardInput<T>& input = p.inputs[k];
      const T* const from =
          input.data + batch * input.strides.batch + channel * input.strides.channel;
#pragma unroll
      for (int r = 0; r < kForwardRows; ++r) {
#pragma unroll
        for (int e = 0; e < kElements; e += kVector) {
          if (plane < p.planes && r < rows_left && e * width < elements_left) {
            const auto own =
                load_vector<kVector>(from + (y0 + r) * input.strides.row + element0 + e * width);
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              sum[r][e + v] += to_accumulate(own[v]);
            }
          }
        }
      }
    }
    for (int k = p.num_same; k < p.num_inputs; ++k) {
      const ForwardInput<T>& input = p.inputs[k];
      const Table table(tables + (k - p.num_same) * table_bytes, items, rows, p.staged_rows);
      const T* const from =
          input.data + batch * input.strides.batch + channel * input.strides.channel;
      const int total = plane < p.planes ? *table.count * items : 0;
      for (int i = thread; i < total; i += kBatch * threads) {
        Vector<T, kItem> left[kBatch];
        Vector<T, kItem> right[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int at = i + b * threads;
          const int item = at & (items - 1);
          if (at < total && table.left[item] >= 0) {
            const T* const row = from + table.source[at >> item_bits] * input.strides.row;
            left[b] = load_vector<kItem>(row + table.left[item]);
            right[b] = load_vector<kItem>(row + table.right[item]);
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int at = i + b * threads;
          const int item = at & (items - 1);
          if (at < total) {
            const bool inside = table.left[item] >= 0;
            Vector<A, kItem> spread;
#pragma unroll
            for (int v = 0; v < kItem; ++v) {
              const A up = portable::exact_fma(table.right_weight[item], to_accumulate(right[b][v]),
                                               table.left_weight[item] * to_accumulate(left[b][v]));
              spread[v] = inside ? up : A{};
            }
            store_vector(staged + at * kItem, spread);
          }
        }
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kForwardRows; ++r) {
        const int row = ty * kForwardRows + r;
        const int upper = table.upper[row];
        if (upper < 0 || plane >= p.planes) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            sum[r][e] += A{};
          }
          continue;
        }
        const A w0 = table.upper_weight[row];
        const A w1 = table.lower_weight[row];
        const A* const above = staged + upper * length + tx * kVector;
        const A* const below = staged + table.lower[row] * length + tx * kVector;
#pragma unroll
        for (int e = 0; e < kElements; e += kVector) {
          const auto a = load_vector<kVector>(above + e * width);
          const auto b = load_vector<kVector>(below + e * width);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            sum[r][e + v] += portable::exact_fma(w1, b[v], w0 * a[v]);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kForwardRows; ++r) {
#pragma unroll
      for (int e = 0; e < kElements; e += kVector) {
        if (plane < p.planes && r < rows_left && e * width < elements_left) {
          Vector<T, kVector> result;
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const A value = sum[r][e + v];
            result[v] = from_accumulate<T>(p.relu && value < A{} ? A{} : value);  // NaN stays
          }
          store_global_vector(p.out + (plane * p.height + y0 + r) * p.row + element0 + e * width,
                              result);
        }
      }
    }
  }
}

}  // namespace pydense
