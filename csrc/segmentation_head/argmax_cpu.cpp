// SPDX-License-Identifier: Apache-2.0
// Labels of a tile. Each source row is read once, together with its own argmax; where the corners
// of all cells under a vector of outputs agree, they decide: weights that are not negative and
// rounding that is monotone keep the order of the classes. Elsewhere all classes are interpolated,
// for a few output rows at a time in registers.
#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "segmentation_head/exp2_log.h"
#include "segmentation_head/tile_cpu.h"

namespace pydense::PYDENSE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 8;
#else
constexpr int kMaxRows = 4;
#endif

template <class T>
class ArgmaxTile {
 public:
  ArgmaxTile(const UpsampleArgmaxArgs<T>& args, const HeadTask& task)
      : args_(args),
        image_(task.image),
        tile_(*args.x, task.first_column, task.first_column + task.columns),
        stride_(tile_.source_stride()),
        buffer_(buffer_of<T>(static_cast<size_t>((2 * args.logits.classes + 2) * stride_))) {
    for (int64_t s = 0; s < 2; ++s) {
      slots_[s].values = buffer_.template as<T>() + s * (args.logits.classes + 1) * stride_;
      slots_[s].labels =
          reinterpret_cast<LaneInt<T>*>(slots_[s].values + args.logits.classes * stride_);
    }
  }

  void run(const OutputRows& rows) {
    const AxisTable<T>& y = *args_.y;
    for (int64_t begin = rows.begin; begin < rows.end;) {
      const int64_t at = begin;
      int64_t end = begin + 1;
      while (end < rows.end && y.i0[end] == y.i0[at]) {
        ++end;
      }
      const Slot& top = row(y.i0[at], y.i1[at]);
      const Slot& bottom = row(y.i1[at], y.i0[at]);
      for (int64_t b = 0; b < tile_.count(); ++b) {
        outputs(tile_.block(b), b, top, bottom, begin, end);
      }
      begin = end;
    }
  }

 private:
  static constexpr int kLanes = ColumnTile<T>::kLanes;
  using V = Vec<T, kLanes>;
  using Int = Vec<LaneInt<T>, kLanes>;
  using Block = ColumnBlock<T>;

  struct Slot {
    T* values;           // [classes, stride_]
    LaneInt<T>* labels;  // [stride_], -1 where a value is not finite
    int64_t row = -1;
  };

  // Source row i, in a slot that does not hold `other`.
  const Slot& row(int64_t i, int64_t other) {
    for (const Slot& slot : slots_) {
      if (slot.row == i) {
        return slot;
      }
    }
    Slot& slot = slots_[slots_[0].row == other ? 1 : 0];
    slot.row = i;
    load_source(args_.logits, image_, i, tile_.first_source(), tile_.sources(), slot.values,
                stride_);
    for (int64_t x = 0; x < tile_.sources(); x += kLanes) {
      V best = load<V>(slot.values + x);
      V finite = best * T{0};
      Int label = {};
      for (int64_t c = 1; c < args_.logits.classes; ++c) {
        const V v = load<V>(slot.values + c * stride_ + x);
        const auto larger = v > best;
        best = larger ? v : best;
        label = larger ? Int{} + static_cast<LaneInt<T>>(c) : label;
        finite = fma(v, V{}, finite);
      }
      store(slot.labels + x, finite == V{} ? label : Int{} - 1);
    }
    return slot;
  }

  void outputs(const Block& block, int64_t b, const Slot& top, const Slot& bottom, int64_t begin,
               int64_t end) {
    const auto [corner, right] = block.template taps<Int>(top.labels);
    const auto [below, below_right] = block.template taps<Int>(bottom.labels);
    const Int others[] = {right, below, below_right};
    // All equal: the exclusive or is 0; all finite: the sign is +.
    Int differ = {};
    Int sign = corner;
    for (const Int& other : others) {
      differ |= corner ^ other;
      sign |= other;
    }
    const bool agree = !any_lane(differ);
    const bool finite = !any_lane(Int(sign < 0));
    const int64_t x = tile_.begin() + b * kLanes;
    if (agree && finite && args_.confidence == nullptr) {
      for (int64_t y = begin; y < end; ++y) {
        put_labels(y, x, corner);
      }
      return;
    }
    for (int64_t y = begin; y < end; y += kMaxRows) {
      with_constant<kMaxRows>(std::min<int64_t>(end - y, kMaxRows), [&](auto rows) {
        if (finite && block.near) {
          compute<decltype(rows)::value, true>(block, top.values, bottom.values, y, x);
        } else {
          compute<decltype(rows)::value, false>(block, top.values, bottom.values, y, x);
        }
      });
    }
  }

  // Usual: all values are finite and the block's taps are near. A loop that handles far taps, too,
  // spends as long on preparing them as on the classes.
  template <int Rows, bool Usual>
  [[gnu::noinline]] void compute(const Block& block, const T* top, const T* bottom, int64_t y,
                                 int64_t x) const {
    Block columns = block;
    columns.near = Usual || block.near;
    const T* const h0 = args_.y->w0 + y;
    const T* const h1 = args_.y->w1 + y;
    V best[Rows];
    Int label[Rows] = {};
    const auto value = [&](const V& upper, const V& lower, int r) {
      return fma(broadcast<V>(h1[r]), lower, broadcast<V>(h0[r]) * upper);
    };
    {
      const V upper = columns.interpolate(top);
      const V lower = columns.interpolate(bottom);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        best[r] = value(upper, lower, r);
      }
    }
    for (int64_t c = 1; c < args_.logits.classes; ++c) {
      const V upper = columns.interpolate(top + c * stride_);
      const V lower = columns.interpolate(bottom + c * stride_);
      const Int here = Int{} + static_cast<LaneInt<T>>(c);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const V v = value(upper, lower, r);
        auto wins = v > best[r];
        if constexpr (!Usual) {  // the first NaN wins and stays
          wins |= (v != v) & (best[r] == best[r]);
        }
        best[r] = wins ? v : best[r];
        label[r] = wins ? here : label[r];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      put_labels(y + r, x, label[r]);
    }
    if (args_.confidence != nullptr) {
      V sums[Rows] = {};
      constexpr T kLog2E = 1.4426950408889634;
      for (int64_t c = 0; c < args_.logits.classes; ++c) {
        const V upper = columns.interpolate(top + c * stride_);
        const V lower = columns.interpolate(bottom + c * stride_);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const V below = value(upper, lower, r) - best[r];
          const V quiet = below == below ? below : V{} + std::numeric_limits<T>::quiet_NaN();
          sums[r] = sums[r] + exp2_nonpositive(quiet * broadcast<V>(kLog2E));
        }
      }
      for (int r = 0; r < Rows; ++r) {
        put(args_.confidence, y + r, x, std::array{broadcast<V>(T{1}) / sums[r]});
      }
    }
  }

  // Writes the lanes inside the tile, in parts that follow each other, at (image_, y, x) of a
  // contiguous array.
  template <class U, class W, size_t Parts>
  void put(U* array, int64_t y, int64_t x, const std::array<W, Parts>& values) const {
    U* const to = array + (image_ * args_.y->size + y) * args_.x->size + x;
    if (x + kLanes <= tile_.end()) {
      for (size_t part = 0; part < Parts; ++part) {
        store(to + part * kLanesIn<W>, values[part]);
      }
    } else {
      std::memcpy(to, &values, static_cast<size_t>(tile_.end() - x) * sizeof(U));
    }
  }

  void put_labels(int64_t y, int64_t x, const Int& labels) const {
    const auto put_as = [&]<class U>(U* array) {
      // Integers wider than labels by halves: vectors of two registers would go through memory.
      constexpr int kParts = sizeof(U) > sizeof(LaneInt<T>) ? 2 : 1;
      constexpr int kInPart = kLanes / kParts;
      const auto part = [&]<int First>(IntConstant<First>) {
        return __builtin_convertvector((some_lanes<Vec<LaneInt<T>, kInPart>, First>(labels)),
                                       Vec<U, kInPart>);
      };
      [&]<int... Part>(std::integer_sequence<int, Part...>) {
        put(array, y, x, std::array{part(IntConstant<Part * kInPart>{})...});
      }(std::make_integer_sequence<int, kParts>{});
    };
    switch (args_.label_type) {
      case IntegerType::kUInt8:
        return put_as(static_cast<uint8_t*>(args_.labels));
      case IntegerType::kInt32:
        return put_as(static_cast<int32_t*>(args_.labels));
      default:
        return put_as(static_cast<int64_t*>(args_.labels));
    }
  }

  const UpsampleArgmaxArgs<T>& args_;
  int64_t image_;
  ColumnTile<T> tile_;
  int64_t stride_;
  Buffer buffer_;
  Slot slots_[2];
};

template <class T>
void argmax_task(const UpsampleArgmaxArgs<T>& args, const HeadTask& task) {
  const OutputRows rows = rows_of_group(*args.y, task.group);
  if (rows.begin < rows.end) {
    ArgmaxTile<T>(args, task).run(rows);
  }
}

}  // namespace

extern const UpsampleArgmaxTable kUpsampleArgmaxTable;
const UpsampleArgmaxTable kUpsampleArgmaxTable = {argmax_task<float>, argmax_task<double>};

}  // namespace pydense::PYDENSE_ISA
