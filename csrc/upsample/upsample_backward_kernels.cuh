// SPDX-License-Identifier: Apache-2.0
// Backward of one input on a GPU, a gather without atomics. A block makes a tile of the input's
// gradient: some columns, channels and a band of rows. It goes down the output's gradient once, an
// output's column to a thread, and sums it in registers onto the two rows of the input that it lies
// between. Whenever a row of the input is complete, its sums go through shared memory and are
// collapsed horizontally, a column of the input to a thread.
//
// First down, then along, each in the order of the outputs: the order of the CPU kernel for
// contiguous pictures. How the work is cut changes no sum.
#pragma once

#include "common/cuda.cuh"
#include "upsample/upsample.h"
#include "upsample/upsample_math.h"

namespace pydense {

constexpr int kBackwardThreads = 256;
constexpr int kRowsAhead = 4;  // of the output's gradient, whose loads are in flight at once
constexpr int kTapRows = 64;   // whose taps are worked out at once; a multiple of kRowsAhead

// Elements of a row that a thread sums, and that move in one access where memory allows it.
template <class T>
constexpr int kBackwardElements = 16 / sizeof(Accumulate<T>);

template <class T>
struct BackwardParams {
  int64_t planes;    // pictures of one channel, or of all for channels_last
  int64_t channels;  // planes of an image, or elements of a pixel
  int64_t height;    // of the output
  int64_t width;
  uint32_t bands;
  uint32_t tiles_x;
  int32_t tile_columns;   // of the input, in a block
  int32_t part_channels;  // of a pixel, in a block
  const T* grad;
  PictureStrides grad_strides;
  const T* out;  // dense, null: no mask
  T* to;         // dense
  AxisMap<Accumulate<T>> y;
  AxisMap<Accumulate<T>> x;
};

// Where an element lies in shared memory: an element is skipped now and then, so that lanes that
// are a power of 2 apart find theirs in different banks.
template <class A>
PYDENSE_HD int spaced(int element) {
  return element + element / static_cast<int>(128 / sizeof(A));
}

// What a block keeps in shared memory.
template <class A>
struct BackwardTile {
  A* sums;    // [planes, 2, spaced(elements)]
  A* own;     // [spaced(columns)], weights of the output's columns for their left tap,
  A* next;    // and for the right one, where there are two
  A* carry;   // [planes, tile_columns * part_channels], where the outputs come in several goes
  A* upper;   // [kTapRows], weights of the output's rows
  A* lower;   // 0 where both taps are one row: upper is their sum
  int* row0;  // [kTapRows], rows of the input
  int* row1;
  int* begin;      // [tile_columns + 1], first column of the output with a right tap so far right
  int* own_begin;  // and with a left one

  static int64_t bytes(int64_t planes, int64_t elements, int64_t columns, int64_t tile_columns,
                       int64_t carried) {
    const int64_t sums = spaced<A>(static_cast<int>(elements)) + 1;
    const int64_t weights = spaced<A>(static_cast<int>(columns)) + 1;
    return (2 * planes * sums + 2 * weights + planes * carried + 2 * kTapRows) *
               static_cast<int64_t>(sizeof(A)) +
           (2 * kTapRows + 2 * (tile_columns + 1)) * static_cast<int64_t>(sizeof(int));
  }
  __device__ __forceinline__ BackwardTile(A* memory, int planes, int elements, int columns,
                                          int tile_columns, int carried)
      : sums(memory),
        own(sums + 2 * planes * (spaced<A>(elements) + 1)),
        next(own + spaced<A>(columns) + 1),
        carry(next + spaced<A>(columns) + 1),
        upper(carry + planes * carried),
        lower(upper + kTapRows),
        row0(reinterpret_cast<int*>(lower + kTapRows)),
        row1(row0 + kTapRows),
        begin(row1 + kTapRows),
        own_begin(begin + tile_columns + 1) {}

  // The outputs [first, first + count) for the columns [j0, j1) of the input.
  __device__ __forceinline__ void set_columns(const AxisMap<A>& map, int first, int count, int j0,
                                              int j1, int thread, int threads) const {
    for (int n = thread; n <= count; n += threads) {
      // Each bound is the first output past some column: found where the tap steps over it.
      int left = j1;
      int right = j1;
      if (n < count) {
        const AxisTaps<A> taps = portable::axis_taps(map, int64_t{first} + n);
        own[spaced<A>(n)] = taps.i0 == taps.i1 ? taps.w0 + taps.w1 : taps.w0;
        next[spaced<A>(n)] = taps.w1;
        left = min(static_cast<int>(taps.i0), j1);
        right = min(static_cast<int>(taps.i1), j1);
      }
      int left_before = j0 - 1;
      int right_before = j0 - 1;
      if (n > 0) {
        const AxisTaps<A> before = portable::axis_taps(map, int64_t{first} + n - 1);
        left_before = max(static_cast<int>(before.i0), j0 - 1);
        right_before = max(static_cast<int>(before.i1), j0 - 1);
      }
      for (int j = left_before + 1; j <= left; ++j) {
        own_begin[j - j0] = n;
      }
      for (int j = right_before + 1; j <= right; ++j) {
        begin[j - j0] = n;
      }
    }
  }

  // The rows of the output from y on, before `end`.
  __device__ __forceinline__ void set_rows(const AxisMap<A>& map, int y, int end, int thread,
                                           int threads) const {
    for (int n = thread; n < kTapRows; n += threads) {
      const AxisTaps<A> taps = portable::axis_taps(map, y + n < end ? y + n : end - 1);
      const bool one = taps.i0 == taps.i1;
      upper[n] = one ? taps.w0 + taps.w1 : taps.w0;
      lower[n] = one ? A{} : taps.w1;
      row0[n] = static_cast<int>(taps.i0);
      row1[n] = static_cast<int>(taps.i1);
    }
  }

  // What column j of the tile gets from the sums of a row, in channel c out of `channels`.
  __device__ __forceinline__ A collapse(const A* row, int j, int c, int channels, A sum) const {
    const int middle = own_begin[j];
    for (int n = begin[j]; n < middle; ++n) {
      sum = portable::exact_fma(next[spaced<A>(n)], row[spaced<A>(n * channels + c)], sum);
    }
    const int end = own_begin[j + 1];
    for (int n = middle; n < end; ++n) {
      sum = portable::exact_fma(own[spaced<A>(n)], row[spaced<A>(n * channels + c)], sum);
    }
    return sum;
  }
};

template <class T, int kVector, bool kChannelsLast>
__global__ __launch_bounds__(kBackwardThreads, 2) void upsample_backward_kernel(
    const __grid_constant__ BackwardParams<T> p) {
  using A = Accumulate<T>;
  constexpr int kElements = kBackwardElements<T>;
  constexpr int kItems = kElements / kVector;
  PYDENSE_DYNAMIC_SHARED(A, shared);
  __shared__ int bounds[4];

  const int width = static_cast<int>(blockDim.x);
  const int tx = static_cast<int>(threadIdx.x);
  const int ty = static_cast<int>(threadIdx.y);
  const int threads = width * static_cast<int>(blockDim.y);
  const int thread = tx + width * ty;
  const int elements = width * kElements;
  const int part_channels = kChannelsLast ? p.part_channels : 1;
  const int columns = elements / part_channels;  // of the output, in one go
  const int carried = p.tile_columns * part_channels;
  const BackwardTile<A> tile(shared, static_cast<int>(blockDim.y), elements, columns,
                             p.tile_columns, carried);
  A* const sums = tile.sums + ty * 2 * (spaced<A>(elements) + 1);
  A* const carry = tile.carry + ty * carried;

  // Rows and columns are counted in 32 bits.
  const auto in_height = static_cast<int>(p.y.in_size);
  const auto in_width = static_cast<int>(p.x.in_size);
  const int j0 = static_cast<int>(blockIdx.x % p.tiles_x) * p.tile_columns;
  const int j1 = min(j0 + p.tile_columns, in_width);
  const int64_t band = blockIdx.x / p.tiles_x % p.bands;
  const auto first_row = static_cast<int>(in_height * band / p.bands);
  const auto end_row = static_cast<int>(in_height * (band + 1) / p.bands);
  const int64_t first_channel = int64_t{blockIdx.x / p.tiles_x / p.bands} * part_channels;
  const int64_t unit = kChannelsLast ? p.channels : 1;

  if (thread < 2) {
    const AxisRange range = portable::outputs_of_input(p.x, thread == 0 ? j0 : j1 - 1);
    bounds[thread] = static_cast<int>(thread == 0 ? range.begin : range.end);
  }
  __syncthreads();
  const int first_column = kChannelsLast ? bounds[0] : bounds[0] / kVector * kVector;
  const int end_column = bounds[1];
  const bool in_one_go = end_column - first_column <= columns;
  bool ready = false;
  int parity = 0;

  for (int64_t begin = int64_t{blockIdx.y} * blockDim.y; begin < p.planes;
       begin += int64_t{gridDim.y} * blockDim.y) {
    const int64_t plane = begin + ty;
    const int64_t batch = kChannelsLast ? plane : plane / p.channels;
    const int64_t channel = kChannelsLast ? 0 : plane - batch * p.channels;
    const T* const grad = p.grad + batch * p.grad_strides.batch + channel * p.grad_strides.channel;
    // In several goes, each row of the input is finished before the next one begins.
    for (int top = first_row; top < end_row; top = in_one_go ? end_row : top + 1) {
      const int bottom = in_one_go ? end_row : top + 1;
      for (int go = first_column; go == first_column || go < end_column; go += columns) {
        const int count = min(end_column - go, columns);
        const bool last_go = end_column - go <= columns;
        if (!ready) {
          ready = in_one_go;
          __syncthreads();
          if (thread < 2) {
            const AxisRange range = portable::outputs_of_input(p.y, thread == 0 ? top : bottom - 1);
            bounds[2 + thread] = static_cast<int>(thread == 0 ? range.begin : range.end);
          }
          tile.set_columns(p.x, go, count, j0, j1, thread, threads);
          __syncthreads();
        }
        const int y_begin = bounds[2];
        const int y_end = bounds[3];

        int64_t offset[kItems];  // in a row of the output; -1: not of this block
#pragma unroll
        for (int m = 0; m < kItems; ++m) {
          const int element = (tx + m * width) * kVector;
          const int column = element / part_channels;
          const int64_t c = first_channel + (element - column * part_channels);
          const bool live =
              plane < p.planes && column < count && (!kChannelsLast || c < p.channels);
          offset[m] = live ? int64_t{go + column} * unit + (kChannelsLast ? c : 0) : -1;
        }
        A own_sum[kElements];  // of the gradients of row `row` of the input
        A next_sum[kElements];
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          own_sum[e] = next_sum[e] = A{};
        }
        int row = top;
        const auto next_row = [&] {
          if (row >= top) {
            A* const to = sums + parity * (spaced<A>(elements) + 1);
            parity ^= 1;  // what others still read is not written
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
              to[spaced<A>((tx + e / kVector * width) * kVector + e % kVector)] = own_sum[e];
            }
            __syncthreads();
            int j = tx / part_channels;
            int c = tx - j * part_channels;
            for (int s = tx; s < (j1 - j0) * part_channels; s += width) {
              const A sum =
                  tile.collapse(to, j, c, part_channels, go == first_column ? A{} : carry[s]);
              if (!last_go) {
                carry[s] = sum;
              } else if (plane < p.planes && (!kChannelsLast || first_channel + c < p.channels)) {
                p.to[((plane * in_height + row) * in_width + j0 + j) * unit + first_channel + c] =
                    from_accumulate<T>(sum);
              }
              j += width / part_channels;
              c += width % part_channels;
              if (c >= part_channels) {
                c -= part_channels;
                ++j;
              }
            }
          }
          ++row;
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            own_sum[e] = next_sum[e];
            next_sum[e] = A{};
          }
        };
        for (int y = y_begin; y < y_end; y += kRowsAhead) {
          const int at = (y - y_begin) % kTapRows;
          if (at == 0) {
            __syncthreads();
            tile.set_rows(p.y, y, y_end, thread, threads);
            __syncthreads();
            if (y == y_begin && tile.row0[0] < top) {  // by one: its other tap is in the band
              row = top - 1;
            }
          }
          Vector<T, kVector> values[kRowsAhead][kItems];
#pragma unroll
          for (int r = 0; r < kRowsAhead; ++r) {
#pragma unroll
            for (int m = 0; m < kItems; ++m) {
#pragma unroll
              for (int v = 0; v < kVector; ++v) {
                values[r][m][v] = from_accumulate<T>(A{});
              }
              if (y + r < y_end && offset[m] >= 0) {
                values[r][m] =
                    load_vector<kVector>(grad + (y + r) * p.grad_strides.row + offset[m]);
                if (p.out != nullptr) {
                  const auto out = load_vector<kVector>(
                      p.out + (plane * p.height + y + r) * p.width * unit + offset[m]);
#pragma unroll
                  for (int v = 0; v < kVector; ++v) {
                    if (to_accumulate(out[v]) <= A{}) {
                      values[r][m][v] = from_accumulate<T>(A{});
                    }
                  }
                }
              }
            }
          }
#pragma unroll
          for (int r = 0; r < kRowsAhead; ++r) {
            if (y + r < y_end) {
              while (row < tile.row0[at + r]) {
                next_row();
              }
              const A upper = tile.upper[at + r];
              const A lower = tile.lower[at + r];
              const bool two = tile.row0[at + r] != tile.row1[at + r];
#pragma unroll
              for (int e = 0; e < kElements; ++e) {
                const A value = to_accumulate(values[r][e / kVector][e % kVector]);
                own_sum[e] = portable::exact_fma(upper, value, own_sum[e]);
                if (two) {
                  next_sum[e] = portable::exact_fma(lower, value, next_sum[e]);
                }
              }
            }
          }
        }
        while (row < bottom) {
          next_row();
        }
      }
    }
  }
}

// The gradient of an input of the output's size: that of the output where the ReLU let it pass.
template <class T, int kVector, bool kChannelsLast>
__global__ __launch_bounds__(kBackwardThreads) void upsample_mask_kernel(
    const __grid_constant__ BackwardParams<T> p) {
  const int64_t row = p.width * (kChannelsLast ? p.channels : 1);
  const int64_t e = (int64_t{blockIdx.x % p.tiles_x} * blockDim.x + threadIdx.x) * kVector;
  const int64_t y0 = (int64_t{blockIdx.x / p.tiles_x} * blockDim.y + threadIdx.y) * kRowsAhead;
  for (int64_t plane = blockIdx.y; plane < p.planes; plane += gridDim.y) {
    const int64_t batch = kChannelsLast ? plane : plane / p.channels;
    const int64_t channel = kChannelsLast ? 0 : plane - batch * p.channels;
    const T* const grad = p.grad + batch * p.grad_strides.batch + channel * p.grad_strides.channel;
#pragma unroll
    for (int r = 0; r < kRowsAhead; ++r) {
      if (y0 + r < p.height && e < row) {
        auto value = load_vector<kVector>(grad + (y0 + r) * p.grad_strides.row + e);
        const int64_t at = (plane * p.height + y0 + r) * row + e;
        if (p.out != nullptr) {
          const auto out = load_vector<kVector>(p.out + at);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            if (to_accumulate(out[v]) <= Accumulate<T>{}) {
              value[v] = from_accumulate<T>(Accumulate<T>{});
            }
          }
        }
        store_global_vector(p.to + at, value);
      }
    }
  }
}

}  // namespace pydense
