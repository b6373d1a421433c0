// SPDX-License-Identifier: Apache-2.0
// The sums of a depthwise convolution, of all taps that a segment reads: vectors of columns, or
// vectors of channels of a few pixels.
#pragma once

#include "atrous_conv/depthwise_rows.h"
#include "common/relu.h"

namespace pydense::PYDENSE_ISA {

constexpr int kRowVectors = 4;  // vectors of a row at work
constexpr int kRowPixels = 4;   // of a channels_last row at work

template <class S, class T>
void store_row(const T* from, int64_t count, bool relu, S* to) {
  using V = RowVec<T>;
  constexpr int64_t kLanes = kLanesIn<V>;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_as(to + i, relu_of(load<V>(from + i), relu));
  }
  for (; i < count; ++i) {
    store_as(to + i, relu_of(from[i], relu));
  }
}

// A row of the kernel, and the row of x that it meets.
template <class T>
struct KernelRow {
  const T* x;
  const T* weight;
};

// N vectors of sums, of the taps [first, last) of each row; tap j reads from column + j * dilation.
template <class T, int N>
PYDENSE_HD void sum_columns(const KernelRow<T>* rows, int64_t count, int64_t first, int64_t last,
                            int64_t column, int64_t dilation, T start, T* to) {
  using V = RowVec<T>;
  constexpr int64_t kLanes = kLanesIn<V>;
  V sum[N];
  for (int k = 0; k < N; ++k) {
    sum[k] = broadcast<V>(start);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = first; j < last; ++j) {
      const V weight = broadcast<V>(rows[i].weight[j]);
      const T* const x = rows[i].x + column + j * dilation;
      for (int k = 0; k < N; ++k) {
        sum[k] = fma(weight, load<V>(x + k * kLanes), sum[k]);
      }
    }
  }
  for (int k = 0; k < N; ++k) {
    store(to + k * kLanes, sum[k]);
  }
}

// Sums of N pixels side by side, `count` channels from c on, a vector or a part of one. Pixels of
// the result are to_row apart.
template <class S, class T, int N, class D>
PYDENSE_HD void sum_pixels(const PixelTap<S, const T>* taps, int64_t num_taps, int64_t channels,
                           int64_t c, int64_t count, const T* bias, bool relu, D* to,
                           int64_t to_row) {
  using V = RowVec<T>;
  const bool whole = count == kLanesIn<V>;
  const auto read = [&](const auto* from) {
    return whole ? load_as<V>(from) : load_part<V>(from, count);
  };
  const V start = bias == nullptr ? V{} : read(bias + c);
  V sum[N];
  for (int k = 0; k < N; ++k) {
    sum[k] = start;
  }
  for (int64_t t = 0; t < num_taps; ++t) {
    const V weight = read(taps[t].weight + c);
    for (int k = 0; k < N; ++k) {
      sum[k] = fma(weight, read(taps[t].x + k * channels + c), sum[k]);
    }
  }
  for (int k = 0; k < N; ++k) {
    const V result = relu_of(sum[k], relu);
    if (whole) {
      store_as(to + k * to_row + c, result);
    } else {
      store_part(to + k * to_row + c, result, count);
    }
  }
}

}  // namespace pydense::PYDENSE_ISA
