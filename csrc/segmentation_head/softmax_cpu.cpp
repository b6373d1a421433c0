// SPDX-License-Identifier: Apache-2.0
// Softmax of upsampled logits, its gradient, and the sum over sliding windows.
#include "segmentation_head/softmax_tile.h"

namespace pydense::PYDENSE_ISA {
namespace {

// kLanes values with a stride, `count` of them there.
template <class V, class S>
PYDENSE_HD V load_some(const S* from, int64_t stride, int64_t count) {
  if (stride == 1 && count == kLanesIn<V>) {
    return load_as<V>(from);
  }
  V v = {};
  for (int64_t l = 0; l < count; ++l) {
    v[l] = load_as<LaneOf<V>>(from + l * stride);
  }
  return v;
}
template <class V, class S>
PYDENSE_HD void store_some(S* to, int64_t stride, int64_t count, const V& v) {
  if (stride == 1 && count == kLanesIn<V>) {
    return store_as(to, v);
  }
  for (int64_t l = 0; l < count; ++l) {
    const LaneOf<V> lane = v[l];
    store_as(to + l * stride, lane);
  }
}

// Calls fn(S{}) with the type in memory.
template <class T, class Fn>
void with_stored(FloatType type, const Fn& fn) {
  if constexpr (sizeof(T) == 8) {
    fn(double{});
  } else if (type == FloatType::kBFloat16) {
    fn(BFloat16{});
  } else if (type == FloatType::kFloat16) {
    fn(Half{});
  } else {
    fn(float{});
  }
}

template <class T>
class SoftmaxTask {
 public:
  SoftmaxTask(const UpsampleSoftmaxArgs<T>& args, const HeadTask& task)
      : args_(args),
        image_(task.image),
        group_(task.group),
        tile_(args.logits, *args.y, *args.x, {args.gradient, args.gradient_channels_last},
              task.image, false, nullptr) {}

  template <class S>
  void run() {
    tile_.run(group_, [&](const Strip& rows) {
      for (int64_t b = 0; b < tile_.columns().count(); ++b) {
        with_constant<SoftmaxTile<T>::kMaxRows>(rows.end - rows.begin, [&](auto n) {
          if (tile_.has_gradient()) {
            backward<decltype(n)::value, S>(rows, b);
          } else {
            forward<decltype(n)::value, S>(rows, b);
          }
        });
      }
    });
  }

 private:
  static constexpr int kLanes = SoftmaxTile<T>::kLanes;
  using V = Vec<T, kLanes>;
  using Strip = typename SoftmaxTile<T>::Strip;
  template <int Rows>
  using Sums = typename SoftmaxTile<T>::template Sums<Rows>;

  int64_t offset(int64_t y, int64_t x) const {
    return image_ * args_.full_strides[0] + y * args_.full_strides[2] + x * args_.full_strides[3];
  }
  // exp2_nonpositive does not go below the smallest normal number: what stays there is 0 here, or
  // NaN where the pixel's sum is.
  static V probability(const V& power, const V& scale) {
    return (power <= broadcast<V>(std::numeric_limits<T>::min()) ? V{} : power) * scale;
  }
  int64_t count(int64_t x) const { return std::min<int64_t>(kLanes, tile_.columns().end() - x); }

  template <int Rows, class S>
  void forward(const Strip& rows, int64_t b) {
    Sums<Rows> sums;
    tile_.template exponentials<Rows, true>(rows, b, false, sums,
                                            SoftmaxTile<T>::kSmallSumOfPowers);
    const int64_t x = tile_.columns().begin() + b * kLanes;
    V scale[Rows];
    for (int r = 0; r < Rows; ++r) {
      scale[r] = broadcast<V>(T{1}) / sums.sum[r];
    }
    S* to = static_cast<S*>(args_.out) + offset(rows.begin, x);
    const int64_t row_stride = args_.full_strides[2];
    if (args_.full_strides[1] == 1 && args_.full_strides[3] != 1) {
      return classes_in_a_row<Rows>(to, scale, count(x));
    }
    const T* from = tile_.powers();
    for (int64_t c = 0; c < args_.logits.classes; ++c) {
      for (int r = 0; r < Rows; ++r) {
        store_some(to + r * row_stride, args_.full_strides[3], count(x),
                   probability(load<V>(from), scale[r]));
        from += kLanes;
      }
      to += args_.full_strides[1];
    }
  }

  // Channels last: a vector holds classes.
  template <int Rows, class S>
  void classes_in_a_row(S* to, const V* scale, int64_t count) const {
    for (int r = 0; r < Rows; ++r) {
      for (int64_t c = 0; c < args_.logits.classes; c += kLanes) {
        const int64_t part = std::min<int64_t>(kLanes, args_.logits.classes - c);
        V block[kLanes] = {};
        for (int64_t k = 0; k < part; ++k) {
          block[k] = probability(load<V>(tile_.powers() + ((c + k) * Rows + r) * kLanes), scale[r]);
        }
        transpose_square(block);
        for (int64_t l = 0; l < count; ++l) {
          store_some(to + r * args_.full_strides[2] + l * args_.full_strides[3] + c, 1, part,
                     block[l]);
        }
      }
    }
  }

  // With p = power / sum and g the gradient: p (g - sum over the classes of p g) falls.
  template <int Rows, class S>
  void backward(const Strip& rows, int64_t b) {
    Sums<Rows> sums;
    tile_.template exponentials<Rows, true>(rows, b, false, sums);
    const int64_t x = tile_.columns().begin() + b * kLanes;
    const int64_t lanes = count(x);
    const int64_t classes = args_.logits.classes;
    const S* const from = static_cast<const S*>(args_.full_gradient) + offset(rows.begin, x);
    T* const powers = tile_.powers();
    V upper[Rows];
    V lower[Rows];
    for (int r = 0; r < Rows; ++r) {
      const S* const row = from + r * args_.full_strides[2];
      const auto gradient = [&](int64_t c) {
        return load_some<V>(row + c * args_.full_strides[1], args_.full_strides[3], lanes);
      };
      V mean = {};
      for (int64_t c = 0; c < classes; ++c) {
        mean = fma(load<V>(powers + (c * Rows + r) * kLanes), gradient(c), mean);
      }
      mean = mean / sums.sum[r];
      for (int64_t c = 0; c < classes; ++c) {
        T* const power = powers + (c * Rows + r) * kLanes;
        V value = load<V>(power) * (gradient(c) - mean);
        for (int64_t l = lanes; l < kLanes; ++l) {  // columns past the end
          value[l] = 0;
        }
        store(power, value);
      }
      const V scale = broadcast<V>(T{1}) / sums.sum[r];
      upper[r] = broadcast<V>(tile_.weights0(rows.begin)[r]) * scale;
      lower[r] = broadcast<V>(tile_.weights1(rows.begin)[r]) * scale;
    }
    tile_.template fall<Rows>(upper, lower, tile_.falls(rows.top, b), tile_.falls(rows.bottom, b));
  }

  const UpsampleSoftmaxArgs<T>& args_;
  int64_t image_;
  int64_t group_;
  SoftmaxTile<T> tile_;
};

template <class T>
void softmax_task(const UpsampleSoftmaxArgs<T>& args, const HeadTask& task) {
  with_stored<T>(args.logits.type,
                 [&]<class S>(S) { SoftmaxTask<T>(args, task).template run<S>(); });
}

template <class T>
void accumulate_task(const UpsampleAccumulateArgs<T>& args, const HeadTask& task) {
  constexpr int kLanes = ColumnTile<T>::kLanes;
  using V = Vec<T, kLanes>;
  const AxisTable<T>& y = *args.y;
  const OutputRows rows = rows_of_group(y, task.group);
  if (rows.begin == rows.end) {
    return;
  }
  const ColumnTile<T> columns(*args.x, task.first_column, task.first_column + task.columns);
  const int64_t stride = columns.source_stride();
  const int64_t width = columns.count() * kLanes;
  const int64_t classes = args.logits.classes;
  // Sources of one row, and the two rows between which outputs lie, interpolated along x.
  const Buffer buffer = buffer_of<T>(static_cast<size_t>(classes * (stride + 2 * width)));
  T* const source = buffer.as<T>();
  T* const values[] = {source + classes * stride, source + classes * (stride + width)};
  int64_t slots[2] = {-1, -1};
  const auto slot_of = [&](int64_t i, int64_t other) {
    if (slots[0] == i || slots[1] == i) {
      return slots[0] == i ? 0 : 1;
    }
    const int slot = slots[0] == other ? 1 : 0;
    slots[slot] = i;
    load_source(args.logits, task.image, i, columns.first_source(), columns.sources(), source,
                stride);
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t b = 0; b < columns.count(); ++b) {
        store(values[slot] + c * width + b * kLanes,
              columns.block(b).interpolate(source + c * stride));
      }
    }
    return slot;
  };
  for (int64_t begin = rows.begin; begin < rows.end;) {
    const int64_t at = begin;
    int64_t end = begin + 1;
    while (end < rows.end && y.i0[end] == y.i0[at]) {
      ++end;
    }
    const T* const top = values[slot_of(y.i0[at], y.i1[at])];
    const T* const bottom = values[slot_of(y.i1[at], y.i0[at])];
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t row = begin; row < end; ++row) {
        const V h0 = broadcast<V>(y.w0[row]);
        const V h1 = broadcast<V>(y.w1[row]);
        for (int64_t b = 0; b < columns.count(); ++b) {
          const int64_t x = columns.begin() + b * kLanes;
          const int64_t lanes = std::min<int64_t>(kLanes, columns.end() - x);
          const int64_t from = c * width + b * kLanes;
          const V v = fma(h1, load<V>(bottom + from), h0 * load<V>(top + from));
          const V weight =
              load_some<V>(args.weight + row * args.weight_strides[0] + x * args.weight_strides[1],
                           args.weight_strides[1], lanes);
          T* const to = args.out + task.image * args.out_strides[0] + c * args.out_strides[1] +
                        row * args.out_strides[2] + x * args.out_strides[3];
          const V before = load_some<V>(to, args.out_strides[3], lanes);
          store_some(to, args.out_strides[3], lanes, fma(v, weight, before));
        }
      }
    }
    begin = end;
  }
}

}  // namespace

extern const UpsampleSoftmaxTable kUpsampleSoftmaxTable;
const UpsampleSoftmaxTable kUpsampleSoftmaxTable = {
    softmax_task<float>, softmax_task<double>, accumulate_task<float>, accumulate_task<double>};

}  // namespace pydense::PYDENSE_ISA
