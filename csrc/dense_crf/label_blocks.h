// SPDX-License-Identifier: Apache-2.0
// Between arrays [labels, points] in any memory order and blocks of a few points' rows.
#pragma once

#include <cstring>

#include "common/simd.h"
#include "dense_crf/lattice_rows.h"
#include "dense_crf/mean_field.h"

namespace pydense::PYDENSE_ISA {

template <class V>
PYDENSE_HD void transpose4(V* v) {
  const V low01 = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
  const V high01 = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const V low23 = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
  const V high23 = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  v[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  v[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  v[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  v[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// to[i, j] = factor * from[j, i] for i < rows, j < columns; a row of `from` and of `to` is
// contiguous.
template <class T>
PYDENSE_HD void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int rows,
                          int columns, T factor) {
  using V = Vec<T, 4>;
  int i = 0;
  for (; i + 4 <= rows; i += 4) {
    int j = 0;
    for (; j + 4 <= columns; j += 4) {
      V v[4];
      for (int k = 0; k < 4; ++k) {
        v[k] = load<V>(from + (j + k) * from_stride + i) * factor;
      }
      transpose4(v);
      for (int k = 0; k < 4; ++k) {
        store(to + (i + k) * to_stride + j, v[k]);
      }
    }
    for (; j < columns; ++j) {
      for (int k = 0; k < 4; ++k) {
        to[(i + k) * to_stride + j] = from[j * from_stride + i + k] * factor;
      }
    }
  }
  for (; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      to[i * to_stride + j] = from[j * from_stride + i] * factor;
    }
  }
}

// to[i] = from[i] * factor for the labels of one point.
template <class T>
PYDENSE_HD void copy_labels(const T* from, T* to, int labels, T factor) {
  using V = Vec<T, kNativeLanesOf<T>>;
  constexpr int kLanes = kNativeLanesOf<T>;
  int l = 0;
  for (; l + kLanes <= labels; l += kLanes) {
    store(to + l, load<V>(from + l) * factor);
  }
  for (; l < labels; ++l) {
    to[l] = from[l] * factor;
  }
}

// Asks for a part of what the run after the next will read, in the second-level cache: planes part,
// part + parts, ... of values whose points are contiguous. The hardware does not follow that many
// planes by itself, and asking for all at once holds up everything else.
template <int Write, class T>
PYDENSE_HD void prefetch_ahead(const LabelArray<T>& values, const Run& run, int labels, int part,
                               int parts) {
  T* ahead = values.data + run.pixel + run.ahead;
  for (int l = part; l < labels; l += parts) {
    __builtin_prefetch(ahead + l * values.label_stride, Write, 2);
    __builtin_prefetch(ahead + l * values.label_stride + run.count - 1, Write, 2);
  }
}

// Writes `padding` behind the labels of rows.
template <class T>
PYDENSE_HD void pad_rows(T* rows, int count, int labels, int64_t width, T padding) {
  for (int64_t l = labels; l < width; ++l) {  // a few columns of many points
    for (int i = 0; i < count; ++i) {
      rows[i * width + l] = padding;
    }
  }
}

// Rows without padding, and back; what is read may go on for a row's padding.
template <class T>
PYDENSE_HD void store_rows(const T* rows, int count, int labels, int64_t width, T* to) {
  for (int i = 0; i < count; ++i) {
    std::memcpy(to + int64_t{i} * labels, rows + i * width,
                static_cast<size_t>(labels) * sizeof(T));
  }
}
template <int Piece, class T>
PYDENSE_HD void load_rows(const T* from, int count, int labels, int64_t width, T padding, T* rows) {
  for (int i = 0; i < count; ++i) {
    for (int64_t c = 0; c < width; c += Piece) {
      Row<T, Piece>::load_from(from + int64_t{i} * labels + c).store_to(rows + i * width + c);
    }
  }
  pad_rows(rows, count, labels, width, padding);
}

// rows[i] = factor * values of the run's point i, `padding` behind the labels.
template <class T>
PYDENSE_HD void load_block(const LabelArray<const T>& values, const Run& run, int labels,
                           int64_t width, T factor, T padding, T* rows) {
  const T* from = values.data + run.pixel * values.point_stride;
  const int count = run.count;
  if (values.point_stride == 1) {
    transpose(from, values.label_stride, rows, width, count, labels, factor);
  } else if (values.label_stride == 1) {
    for (int i = 0; i < count; ++i) {
      copy_labels(from + i * values.point_stride, rows + i * width, labels, factor);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      for (int l = 0; l < labels; ++l) {
        rows[i * width + l] = from[i * values.point_stride + l * values.label_stride] * factor;
      }
    }
  }
  pad_rows(rows, count, labels, width, padding);
}

template <class T>
PYDENSE_HD void store_block(const T* rows, const Run& run, int labels, int64_t width,
                            const LabelArray<T>& values) {
  T* to = values.data + run.pixel * values.point_stride;
  const int count = run.count;
  if (values.point_stride == 1) {
    transpose(rows, width, to, values.label_stride, labels, count, T{1});
    return;
  }
  if (values.label_stride == 1) {
    for (int i = 0; i < count; ++i) {
      copy_labels(rows + i * width, to + i * values.point_stride, labels, T{1});
    }
    return;
  }
  for (int i = 0; i < count; ++i) {
    for (int l = 0; l < labels; ++l) {
      to[i * values.point_stride + l * values.label_stride] = rows[i * width + l];
    }
  }
}

}  // namespace pydense::PYDENSE_ISA
