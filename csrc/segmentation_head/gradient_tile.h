// SPDX-License-Identifier: Apache-2.0
// The gradient of a softmax's logits: from the values of a tile's columns at two source rows to the
// sources themselves, in the caller's array. Part of SoftmaxTile.
#pragma once

#include <cstring>

#include "segmentation_head/tile_cpu.h"

namespace pydense::PYDENSE_ISA {

// Where a gradient goes; data may be null.
template <class T>
struct GradientArray {
  T* data;  // [images, classes, height, width]
  bool channels_last;
};

// Lets the columns of source rows fall onto the sources. Rows of falls are [planes, width], where
// planes beyond the classes are a matter of the caller, and padded to whole vectors.
template <class T>
class GradientTile {
 public:
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;

  GradientTile(const LogitsView& shape, const AxisTable<T>& x, const GradientArray<T>& array,
               int64_t image)
      : shape_(shape), x_(x), array_(array), image_(image), classes_(shape.classes) {}

  bool wanted() const { return array_.data != nullptr; }

  // The rows that only this group of source rows writes before its phase: all it touches for an
  // even group, for an odd one those between.
  void zero(int64_t group) const {
    const bool even = group % 2 == 0;
    const int64_t begin = group * kGroupRows + (even ? 0 : 1);
    const int64_t end = std::min(shape_.height, (group + 1) * kGroupRows + (even ? 1 : 0));
    if (begin >= end) {
      return;
    }
    const int64_t planes = array_.channels_last ? 1 : classes_;
    const int64_t row = array_.channels_last ? shape_.width * classes_ : shape_.width;
    for (int64_t p = 0; p < planes; ++p) {
      T* const to = array_.data + ((image_ * planes + p) * shape_.height + begin) * row;
      std::memset(to, 0, static_cast<size_t>((end - begin) * row) * sizeof(T));
    }
  }

  // Elements of scratch for a tile; it starts at `scratch`.
  static int64_t scratch_of(int64_t sources) {
    const int64_t low = round_up(sources + 2, kLanes);
    return low * kLanes + low;
  }
  void start(const ColumnTile<T>& columns, int64_t width, T* scratch) {
    columns_ = &columns;
    width_ = width;
    low_ = scratch;
    extra_ = low_ + round_up(columns.sources() + 2, kLanes) * kLanes;
  }

  // Adds source row i. With `miss`, plane `classes` holds what each class loses times its weight
  // (null for 1).
  void add(int64_t i, const T* falls, bool miss, const T* weight) {
    const int64_t sources = columns_->sources();
    if (miss) {
      const int64_t group = classes_ / kLanes * kLanes;
      gather_columns(falls + group * width_);
      for (int64_t q = 0; q < sources; ++q) {
        extra_[q] = low_[q * kLanes + classes_ - group];
      }
    }
    for (int64_t c = 0; c < classes_; c += kLanes) {
      gather_columns(falls + c * width_);
      const int64_t count = std::min<int64_t>(kLanes, classes_ - c);
      if (miss) {
        V factor = V{} + T{1};
        for (int64_t k = 0; weight != nullptr && k < count; ++k) {
          factor[k] = weight[c + k];
        }
        for (int64_t q = 0; q < sources; ++q) {
          T* const at = low_ + q * kLanes;
          store(at, load<V>(at) - factor * broadcast<V>(extra_[q]));
        }
      }
      add_gradient(i, c, count);
    }
  }

 private:
  // low_[source][class] = sum over the columns, kLanes classes at once.
  [[gnu::noinline]] void gather_columns(const T* from) const {
    const int64_t columns = columns_->end() - columns_->begin();
    const int64_t at = columns_->begin();
    const int32_t* const i0 = x_.i0 + at;
    const int32_t* const i1 = x_.i1 + at;
    const T* const w0 = x_.w0 + at;
    const T* const w1 = x_.w1 + at;
    int32_t left = i0[0];
    T* to = low_;
    V sum_left = {};
    V sum_right = {};
    for (int64_t begin = 0; begin < columns; begin += kLanes) {
      V classes[kLanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) {
        classes[k] = load<V>(from + k * width_ + begin);
      }
      transpose_square(classes);
      const int64_t count = std::min<int64_t>(kLanes, columns - begin);
      for (int64_t l = 0; l < count; ++l) {
        const int64_t x = begin + l;
        for (; left < i0[x]; ++left) {
          store(to, sum_left);
          to += kLanes;
          sum_left = sum_right;
          sum_right = V{};
        }
        sum_left = fma(broadcast<V>(w0[x]), classes[l], sum_left);
        V& second = i1[x] > left ? sum_right : sum_left;
        second = fma(broadcast<V>(w1[x]), classes[l], second);
      }
    }
    store(to, sum_left);
    store(to + kLanes, sum_right);
  }

  // Adds low_ to the gradient of `count` classes from c of source row i.
  void add_gradient(int64_t i, int64_t c, int64_t count) const {
    const int64_t sources = columns_->sources();
    const int64_t first = columns_->first_source();
    if (array_.channels_last) {
      T* to = array_.data + ((image_ * shape_.height + i) * shape_.width + first) * classes_ + c;
      for (int64_t q = 0; q < sources; ++q) {
        for (int64_t k = 0; k < count; ++k) {
          to[k] += low_[q * kLanes + k];
        }
        to += classes_;
      }
      return;
    }
    for (int64_t q = 0; q < sources; q += kLanes) {
      V rows[kLanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) {
        rows[k] = load<V>(low_ + (q + k) * kLanes);
      }
      transpose_square(rows);
      const int64_t part = std::min<int64_t>(kLanes, sources - q);
      for (int64_t k = 0; k < count; ++k) {
        T* const to = array_.data +
                      ((image_ * classes_ + c + k) * shape_.height + i) * shape_.width + first + q;
        if (part == kLanes) {
          store(to, load<V>(to) + rows[k]);
        } else {
          for (int64_t l = 0; l < part; ++l) {
            to[l] += rows[k][l];
          }
        }
      }
    }
  }

  const LogitsView& shape_;
  const AxisTable<T>& x_;
  GradientArray<T> array_;
  int64_t image_;
  int64_t classes_;
  const ColumnTile<T>* columns_ = nullptr;
  int64_t width_ = 0;
  T* low_ = nullptr;    // [sources + 2, kLanes]
  T* extra_ = nullptr;  // [sources]
};

}  // namespace pydense::PYDENSE_ISA
