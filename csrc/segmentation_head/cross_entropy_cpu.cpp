// SPDX-License-Identifier: Apache-2.0
// Cross-entropy of a group of source rows, and what the group adds to the gradient.
//
// A tile of columns goes down the source rows. Each row is loaded once, made relative to its own
// largest class (softmax does not change, and every interpolated value is at most 0: no pass for
// the maximum), scaled to powers of 2 and interpolated along x. A block is one vector of columns
// times a few output rows: exponentials of all classes stay in the first-level cache, their sums in
// registers. Then, with the factors of softmax known, the rows of a block fall onto the two source
// rows, and once per source row all columns fall onto the source's columns, for which a vector
// holds classes.
//
// Relative to the sources' largest classes all of a pixel's values may be far below 0, where its
// neighbours have large logits of different classes: a block in which a sum gets too small is made
// again relative to the pixels' own largest values.
#include <cstring>
#include <limits>

#include "segmentation_head/exp2_log.h"
#include "segmentation_head/tile_cpu.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int kMaxRows = 4;       // of a block
constexpr int64_t kSources = 16;  // of a tile, where a tile is not a single vector
constexpr int64_t kMaxSteps = 8;  // of a tile

template <class T>
class CrossEntropyTile {
 public:
  static constexpr int kLanes = ColumnTile<T>::kLanes;

  CrossEntropyTile(const UpsampleCrossEntropyArgs<T>& args, const HeadTask& task,
                   CrossEntropySums& sums)
      : args_(args),
        task_(task),
        sums_(sums),
        classes_(args.logits.classes),
        planes_(classes_ + (args.smoothing > 0 ? 1 : 0)),
        padded_planes_(round_up(planes_, kLanes)) {
    const auto smoothing = static_cast<T>(args.smoothing);
    hit_ = 1 - smoothing;
    miss_ = smoothing / static_cast<T>(classes_);
    double weights = static_cast<double>(classes_);
    if (args.weight != nullptr) {
      weights = 0;
      for (int64_t c = 0; c < classes_; ++c) {
        weights += static_cast<double>(args.weight[c]);
      }
    }
    miss_all_ = static_cast<T>(args.smoothing / static_cast<double>(classes_) * weights);
  }

  void run() {
    const OutputRows rows = rows_of_group(*args_.y, task_.group);
    zero_gradient();
    if (rows.begin == rows.end) {
      return;
    }
    const int64_t end = args_.x->size();
    for (int64_t x = 0; x < end;) {
      const int64_t next = end_of_tile(x);
      ColumnTile<T> columns(*args_.x, x, next);
      columns_ = &columns;
      allocate();
      down(rows);
      x = next;
    }
  }

 private:
  using V = Vec<T, kLanes>;
  using Int = Vec<LaneInt<T>, kLanes>;

  // Tiles grow by as many columns on every instruction set: sums have one order.
  static constexpr int kStep = 64 / sizeof(T);
  using Step = Vec<T, kStep>;

  // As many columns as need kSources sources, in whole steps.
  int64_t end_of_tile(int64_t x) const {
    const int64_t size = args_.x->size();
    const auto* const i0 = args_.x->i0.data();
    const auto* const i1 = args_.x->i1.data();
    int64_t end = std::min(x + kStep, size);
    for (int64_t steps = 1; steps < kMaxSteps && end < size; ++steps) {
      const int64_t next = std::min(end + kStep, size);
      if (i1[next - 1] - i0[x] >= kSources) {
        break;
      }
      end = next;
    }
    return end;
  }

  void allocate() {
    width_ = round_up(columns_->end() - columns_->begin(), kStep);
    stride_ = columns_->source_stride();
    const int64_t row = padded_planes_ * width_;
    const int64_t low = round_up(columns_->sources() + 2, kLanes);
    const int64_t sizes[] = {
        planes_ * stride_, row, row, row, row, classes_ * kMaxRows * kLanes, low * kLanes, low,
        kMaxRows * width_};
    int64_t total = 0;
    for (const int64_t size : sizes) {
      total += round_up(size, kStep);
    }
    const auto bytes = static_cast<size_t>(total) * sizeof(T);
    if (buffer_.bytes() < bytes) {
      buffer_ = Buffer(bytes);
    }
    T* at = buffer_.template as<T>();
    T** const arrays[] = {&source_, &values_[0], &values_[1], &falls_[0], &falls_[1],
                          &powers_, &low_,       &extra_,     &losses_};
    for (size_t k = 0; k < std::size(sizes); ++k) {
      *arrays[k] = at;
      at += round_up(sizes[k], kStep);
    }
    rows_[0] = rows_[1] = -1;
    if (args_.gradient != nullptr) {
      std::memset(falls_[0], 0, static_cast<size_t>(2 * round_up(row, kStep)) * sizeof(T));
    }
    std::memset(losses_, 0, static_cast<size_t>(kMaxRows * width_) * sizeof(T));
  }

  // ---- down a tile ----

  void down(const OutputRows& rows) {
    const AxisTable<T>& y = *args_.y;
    for (int64_t begin = rows.begin; begin < rows.end;) {
      const auto at = static_cast<size_t>(begin);
      int64_t end = begin + 1;
      while (end < rows.end && end - begin < kMaxRows &&
             y.i0[static_cast<size_t>(end)] == y.i0[at]) {
        ++end;
      }
      const int top = slot_of(y.i0[at], y.i1[at]);
      const int bottom = slot_of(y.i1[at], y.i0[at]);
      for (int64_t b = 0; b < columns_->count(); ++b) {
        with_rows<kMaxRows>(
            end - begin, [&](auto count) { block<decltype(count)::value>(b, begin, top, bottom); });
      }
      for (int64_t x = 0; x < (end - begin) * width_; x += kStep) {
        sums_.loss += static_cast<double>(lane_sum<kStep>(load<Step>(losses_ + x)));
      }
      for (double& weight : row_weights_) {
        sums_.weight += weight;
        weight = 0;
      }
      begin = end;
    }
    for (int slot = 0; slot < 2; ++slot) {
      leave(slot);
    }
  }

  // The slot of source row i; row `other` stays.
  int slot_of(int64_t i, int64_t other) {
    for (int slot = 0; slot < 2; ++slot) {
      if (rows_[slot] == i) {
        return slot;
      }
    }
    const int slot = rows_[0] == other || (rows_[1] != other && rows_[1] < rows_[0]) ? 1 : 0;
    leave(slot);
    rows_[slot] = i;
    enter(slot);
    return slot;
  }

  // Loads a source row: interpolated along x, relative to the largest class, in units of log(2).
  void enter(int slot) {
    load_source(args_.logits, task_.image, rows_[slot], columns_->first_source(),
                columns_->sources(), source_, stride_);
    constexpr T kLog2E = 1.4426950408889634;
    for (int64_t x = 0; x < columns_->sources(); x += kLanes) {
      V largest = load<V>(source_ + x);
      for (int64_t c = 1; c < classes_; ++c) {
        largest = max(load<V>(source_ + c * stride_ + x), largest);
      }
      V sum = {};
      for (int64_t c = 0; c < classes_; ++c) {
        T* const at = source_ + c * stride_ + x;
        const V v = (load<V>(at) - largest) * broadcast<V>(kLog2E);
        // One NaN for all: exp2_nonpositive looks at the lowest bits.
        const V quiet = v == v ? v : V{} + std::numeric_limits<T>::quiet_NaN();
        store(at, quiet);
        sum =
            args_.weight == nullptr ? sum + quiet : fma(quiet, broadcast<V>(args_.weight[c]), sum);
      }
      if (planes_ > classes_) {
        store(source_ + classes_ * stride_ + x, sum);
      }
    }
    for (int64_t c = 0; c < planes_; ++c) {
      T* const to = values_[slot] + c * width_;
      for (int64_t b = 0; b < columns_->count(); ++b) {
        store(to + b * kLanes, columns_->block(b).interpolate(source_ + c * stride_));
      }
    }
  }

  // ---- one block ----

  // Pixels of one output row of a block. Columns past the end and ignored pixels have target -1.
  struct Pixels {
    int32_t target[kLanes];
    T hit[kLanes];   // what stands before -log p of the target,
    T all[kLanes];   // before the logarithm of the sum,
    T miss[kLanes];  // and before -log p of every class
  };

  template <int Rows>
  void block(int64_t b, int64_t y, int top, int bottom) {
    Pixels pixels[Rows];
    bool active = false;
    for (int r = 0; r < Rows; ++r) {
      active =
          read_pixels(y + r, columns_->begin() + b * kLanes, pixels[r], row_weights_[r]) || active;
    }
    if (!active) {  // ignored pixels take no part, whatever their logits
      for (int r = 0; r < Rows; ++r) {
        put_loss(r, y + r, b, V{});
      }
      return;
    }
    const T* const upper = values_[top] + b * kLanes;
    const T* const lower = values_[bottom] + b * kLanes;
    const T* const h0 = args_.y->w0.data() + y;
    const T* const h1 = args_.y->w1.data() + y;
    V sum[Rows];
    V largest[Rows] = {};
    V shift[Rows] = {};
    if (args_.gradient != nullptr) {
      args_.count_correct ? powers<Rows, true, true>(upper, lower, h0, h1, sum, largest)
                          : powers<Rows, true, false>(upper, lower, h0, h1, sum, largest);
    } else {
      args_.count_correct ? powers<Rows, false, true>(upper, lower, h0, h1, sum, largest)
                          : powers<Rows, false, false>(upper, lower, h0, h1, sum, largest);
    }
    constexpr T kSmall = sizeof(T) == 4 ? T(1e-25) : T(1e-280);
    bool small = false;
    for (int r = 0; r < Rows; ++r) {
      for (int l = 0; l < kLanes; ++l) {
        small = small || sum[r][l] < kSmall;
      }
    }
    if (small) [[unlikely]] {
      for (int r = 0; r < Rows; ++r) {
        shifted_powers(upper, lower, h0[r], h1[r], powers_ + r * kLanes, Rows * kLanes, &sum[r],
                       &shift[r]);
        largest[r] = shift[r];
      }
    }
    for (int r = 0; r < Rows; ++r) {
      finish_row(b, r, y + r, pixels[r], sum[r], largest[r], shift[r], upper, lower, h0[r], h1[r]);
    }
    if (args_.gradient != nullptr) {
      fall<Rows>(pixels, sum, h0, h1, falls_[top] + b * kLanes, falls_[bottom] + b * kLanes);
    }
  }

  // False where no pixel of the row counts.
  bool read_pixels(int64_t y, int64_t x, Pixels& pixels, double& row_weight) {
    const int64_t* const strides = args_.target_strides;
    const int64_t offset = task_.image * strides[0] + y * strides[1] + x * strides[2];
    const int64_t count = std::min<int64_t>(kLanes, columns_->end() - x);
    switch (args_.target_type) {
      case IntegerType::kUInt8:
        read_targets(static_cast<const uint8_t*>(args_.target) + offset, count, pixels.target);
        break;
      case IntegerType::kInt8:
        read_targets(static_cast<const int8_t*>(args_.target) + offset, count, pixels.target);
        break;
      case IntegerType::kInt16:
        read_targets(static_cast<const int16_t*>(args_.target) + offset, count, pixels.target);
        break;
      case IntegerType::kInt32:
        read_targets(static_cast<const int32_t*>(args_.target) + offset, count, pixels.target);
        break;
      default:
        read_targets(static_cast<const int64_t*>(args_.target) + offset, count, pixels.target);
    }
    bool any = false;
    for (int l = 0; l < kLanes; ++l) {
      any = any || pixels.target[l] >= 0;
    }
    if (!any) {
      for (int l = 0; l < kLanes; ++l) {
        pixels.hit[l] = pixels.all[l] = pixels.miss[l] = 0;
      }
      return false;
    }
    if (args_.weight == nullptr && args_.pixel_weight == nullptr) {
      int valid_pixels = 0;
      for (int l = 0; l < kLanes; ++l) {
        const bool valid = pixels.target[l] >= 0;
        pixels.hit[l] = valid ? hit_ : T{};
        pixels.all[l] = valid ? hit_ + miss_all_ : T{};
        pixels.miss[l] = valid ? miss_ : T{};
        valid_pixels += valid ? 1 : 0;
      }
      row_weight += valid_pixels;
      sums_.valid += valid_pixels;
      return true;
    }
    const int64_t* const steps = args_.pixel_weight_strides;
    const T* const factors =
        args_.pixel_weight == nullptr
            ? nullptr
            : args_.pixel_weight + task_.image * steps[0] + y * steps[1] + x * steps[2];
    any = false;
    for (int l = 0; l < kLanes; ++l) {
      const int32_t t = pixels.target[l];
      pixels.hit[l] = pixels.all[l] = pixels.miss[l] = 0;
      if (t < 0) {
        continue;
      }
      const T factor = factors == nullptr ? T{1} : factors[l * steps[2]];
      const T weight = args_.weight == nullptr ? factor : factor * args_.weight[t];
      pixels.hit[l] = hit_ * weight;
      pixels.all[l] = hit_ * weight + factor * miss_all_;
      pixels.miss[l] = factor * miss_;
      row_weight += static_cast<double>(weight);
      ++sums_.valid;
      any = any || factor != 0;
    }
    return any || args_.count_correct;
  }

  template <class L>
  void read_targets(const L* from, int64_t count, int32_t* to) {
    const int64_t stride = args_.target_strides[2];
    for (int64_t l = 0; l < count; ++l) {
      const auto label = static_cast<int64_t>(from[l * stride]);
      const bool valid = label >= 0 && label < classes_;
      const bool ignored = label == args_.ignore_index;
      to[l] = valid && !ignored ? static_cast<int32_t>(label) : -1;
      if (!valid && !ignored && !sums_.refused) {
        sums_.refused = true;
        sums_.label = label;
      }
    }
    for (int64_t l = count; l < kLanes; ++l) {
      to[l] = -1;
    }
  }

  // Sums of powers over the classes, their largest exponents, and in powers_[class][Rows] the
  // powers themselves. Not inlined, as fall: each gets all registers.
  template <int Rows, bool Keep, bool Largest>
  [[gnu::noinline]] void powers(const T* upper, const T* lower, const T* h0, const T* h1, V* sums,
                                V* largests) const {
    V sum[Rows] = {};
    V largest[Rows];
    for (int r = 0; r < Rows; ++r) {
      largest[r] = V{} - std::numeric_limits<T>::infinity();
    }
    T* to = powers_;
    for (int64_t c = 0; c < classes_; ++c) {
      const V above = load<V>(upper + c * width_);
      const V below = load<V>(lower + c * width_);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const V v = fma(broadcast<V>(h1[r]), below, broadcast<V>(h0[r]) * above);
        if constexpr (Largest) {
          largest[r] = max(v, largest[r]);
        }
        const V power = exp2_nonpositive(v);
        sum[r] = sum[r] + power;
        if constexpr (Keep) {
          store(to, power);
          to += kLanes;
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      sums[r] = sum[r];
      largests[r] = largest[r];
    }
  }

  // The same for one output row, relative to the pixels' largest values.
  [[gnu::noinline]] void shifted_powers(const T* upper, const T* lower, T h0, T h1, T* to,
                                        int64_t to_stride, V* sums, V* shifts) const {
    const auto value = [&](int64_t c) {
      return fma(broadcast<V>(h1), load<V>(lower + c * width_),
                 broadcast<V>(h0) * load<V>(upper + c * width_));
    };
    V shift = value(0);
    for (int64_t c = 1; c < classes_; ++c) {
      shift = max(value(c), shift);
    }
    V sum = {};
    for (int64_t c = 0; c < classes_; ++c) {
      const V power = exp2_nonpositive(value(c) - shift);
      sum = sum + power;
      store(to + c * to_stride, power);
    }
    *sums = sum;
    *shifts = shift;
  }

  // Loss and counts of one output row.
  void finish_row(int64_t b, int r, int64_t y, const Pixels& pixels, const V& sum, const V& largest,
                  const V& shift, const T* upper, const T* lower, T h0, T h1) {
    const V weight_hit = load<V>(pixels.hit);
    const V weight_all = load<V>(pixels.all);
    V target = {};
    for (int l = 0; l < kLanes; ++l) {
      const int32_t t = pixels.target[l];
      if (t >= 0) {
        // As in powers, for the comparison with the largest.
        target[l] = fma(h1, lower[t * width_ + l], h0 * upper[t * width_ + l]);
        sums_.correct += args_.count_correct && target[l] == largest[l] ? 1 : 0;
      }
    }
    constexpr T kLn2 = 0.6931471805599453;
    const V log_sum = fma(shift, broadcast<V>(kLn2), log_positive(sum));
    V inner = weight_hit * target;
    if (planes_ > classes_) {
      const V rest = fma(broadcast<V>(h1), load<V>(lower + classes_ * width_),
                         broadcast<V>(h0) * load<V>(upper + classes_ * width_));
      inner = fma(load<V>(pixels.miss), rest, inner);
    }
    V loss = fma(weight_all, log_sum, V{} - inner * broadcast<V>(kLn2));
    // Where the pixel has no weight, its NaN or infinity is not asked for.
    loss = (weight_all == V{}) & (weight_hit == V{}) ? V{} : loss;
    put_loss(r, y, b, loss);
  }

  void put_loss(int r, int64_t y, int64_t b, const V& loss) const {
    store(losses_ + r * width_ + b * kLanes, loss);
    if (args_.loss != nullptr) {
      const int64_t x = columns_->begin() + b * kLanes;
      const int64_t count = std::min<int64_t>(kLanes, columns_->end() - x);
      std::memcpy(args_.loss + (task_.image * args_.y->size() + y) * args_.x->size() + x, &loss,
                  static_cast<size_t>(count) * sizeof(T));
    }
  }

  // ---- gradient ----

  // Adds the gradient of a block's rows to the falls of the two source rows, and takes off what
  // belongs to the targets.
  template <int Rows>
  void fall(const Pixels* pixels, const V* sums, const T* h0, const T* h1, T* upper, T* lower) {
    V to_upper[Rows];
    V to_lower[Rows];
    for (int r = 0; r < Rows; ++r) {
      const V all = load<V>(pixels[r].all);
      const V scale = all == V{} ? V{} : all / sums[r];
      to_upper[r] = broadcast<V>(h0[r]) * scale;
      to_lower[r] = broadcast<V>(h1[r]) * scale;
      for (int l = 0; l < kLanes; ++l) {
        if (all[l] == 0 && !(sums[r][l] <= std::numeric_limits<T>::max())) [[unlikely]] {
          for (int64_t c = 0; c < classes_; ++c) {  // 0 * NaN would be NaN
            powers_[(c * Rows + r) * kLanes + l] = 0;
          }
        }
      }
    }
    fall_classes<Rows>(to_upper, to_lower, upper, lower);
    for (int r = 0; r < Rows; ++r) {
      for (int l = 0; l < kLanes; ++l) {
        const int32_t t = pixels[r].target[l];
        if (t >= 0) {
          upper[t * width_ + l] -= h0[r] * pixels[r].hit[l];
          lower[t * width_ + l] -= h1[r] * pixels[r].hit[l];
        }
      }
      if (planes_ > classes_) {
        const V miss = load<V>(pixels[r].miss);
        T* const above = upper + classes_ * width_;
        T* const below = lower + classes_ * width_;
        store(above, load<V>(above) + broadcast<V>(h0[r]) * miss);
        store(below, load<V>(below) + broadcast<V>(h1[r]) * miss);
      }
    }
  }

  template <int Rows>
  [[gnu::noinline]] void fall_classes(const V* to_upper, const V* to_lower, T* upper,
                                      T* lower) const {
    V above[Rows];
    V below[Rows];
    for (int r = 0; r < Rows; ++r) {
      above[r] = to_upper[r];
      below[r] = to_lower[r];
    }
    const T* from = powers_;
    for (int64_t c = 0; c < classes_; ++c) {
      V power[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        power[r] = load<V>(from);
        from += kLanes;
      }
      V sum_above = above[0] * power[0];
      V sum_below = below[0] * power[0];
#pragma GCC unroll 4
      for (int r = 1; r < Rows; ++r) {
        sum_above = fma(above[r], power[r], sum_above);
        sum_below = fma(below[r], power[r], sum_below);
      }
      // One after the other: the two source rows are one where the sizes of the axis are equal.
      store(upper + c * width_, load<V>(upper + c * width_) + sum_above);
      store(lower + c * width_, load<V>(lower + c * width_) + sum_below);
    }
  }

  // The rows that only this group writes before its phase: all it touches for an even group, for
  // an odd one those between.
  void zero_gradient() const {
    if (args_.gradient == nullptr) {
      return;
    }
    const LogitsView& shape = args_.logits;
    const bool even = task_.group % 2 == 0;
    const int64_t begin = task_.group * kGroupRows + (even ? 0 : 1);
    const int64_t end = std::min(shape.height, (task_.group + 1) * kGroupRows + (even ? 1 : 0));
    if (begin >= end) {
      return;
    }
    const int64_t planes = args_.gradient_channels_last ? 1 : classes_;
    const int64_t row = args_.gradient_channels_last ? shape.width * classes_ : shape.width;
    for (int64_t p = 0; p < planes; ++p) {
      T* const to = args_.gradient + ((task_.image * planes + p) * shape.height + begin) * row;
      std::memset(to, 0, static_cast<size_t>((end - begin) * row) * sizeof(T));
    }
  }

  // Lets the columns of a source row fall onto its source columns, and adds them to the gradient.
  void leave(int slot) {
    if (args_.gradient == nullptr || rows_[slot] < 0) {
      rows_[slot] = -1;
      return;
    }
    const int64_t sources = columns_->sources();
    T* const from = falls_[slot];
    if (planes_ > classes_) {
      const int64_t group = classes_ / kLanes * kLanes;
      gather_columns(from + group * width_);
      for (int64_t q = 0; q < sources; ++q) {
        extra_[q] = low_[q * kLanes + classes_ - group];
      }
    }
    for (int64_t c = 0; c < classes_; c += kLanes) {
      gather_columns(from + c * width_);
      const int64_t count = std::min<int64_t>(kLanes, classes_ - c);
      if (planes_ > classes_) {
        V weight = V{} + T{1};
        for (int64_t k = 0; args_.weight != nullptr && k < count; ++k) {
          weight[k] = args_.weight[c + k];
        }
        for (int64_t q = 0; q < sources; ++q) {
          T* const at = low_ + q * kLanes;
          store(at, load<V>(at) - weight * broadcast<V>(extra_[q]));
        }
      }
      add_gradient(rows_[slot], c, count);
    }
    std::memset(from, 0, static_cast<size_t>(padded_planes_ * width_) * sizeof(T));
    rows_[slot] = -1;
  }

  // low_[source][class] = sum over the columns, kLanes classes at once.
  [[gnu::noinline]] void gather_columns(const T* from) const {
    const int64_t columns = columns_->end() - columns_->begin();
    const auto at = static_cast<size_t>(columns_->begin());
    const int32_t* const i0 = args_.x->i0.data() + at;
    const int32_t* const i1 = args_.x->i1.data() + at;
    const T* const w0 = args_.x->w0.data() + at;
    const T* const w1 = args_.x->w1.data() + at;
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
      transpose(classes);
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
    const LogitsView& shape = args_.logits;
    const int64_t sources = columns_->sources();
    const int64_t first = columns_->first_source();
    if (args_.gradient_channels_last) {
      T* to =
          args_.gradient + ((task_.image * shape.height + i) * shape.width + first) * classes_ + c;
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
      transpose(rows);
      const int64_t part = std::min<int64_t>(kLanes, sources - q);
      for (int64_t k = 0; k < count; ++k) {
        T* const to = args_.gradient +
                      ((task_.image * classes_ + c + k) * shape.height + i) * shape.width + first +
                      q;
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

  const UpsampleCrossEntropyArgs<T>& args_;
  const HeadTask& task_;
  CrossEntropySums& sums_;
  int64_t classes_;
  int64_t planes_;  // and one for the sum over the classes, where labels are smoothed
  int64_t padded_planes_;
  T hit_;
  T miss_;
  T miss_all_;

  const ColumnTile<T>* columns_ = nullptr;
  int64_t width_ = 0;   // of the tile in whole steps
  int64_t stride_ = 0;  // of a class in source_
  Buffer buffer_;
  T* source_ = nullptr;  // [planes, stride_]
  int64_t rows_[2] = {-1, -1};
  T* values_[2] = {};    // [planes, width_] of source row rows_[slot]
  T* falls_[2] = {};     // [padded planes, width_], the gradient of those values
  T* powers_ = nullptr;  // [classes, rows of the block, kLanes]
  T* low_ = nullptr;     // [sources + 2, kLanes]
  double row_weights_[kMaxRows] = {};
  T* losses_ = nullptr;  // [kMaxRows, width_]
  T* extra_ = nullptr;   // [sources]
};

template <class T>
void cross_entropy_task(const UpsampleCrossEntropyArgs<T>& args, const HeadTask& task,
                        CrossEntropySums& sums) {
  CrossEntropyTile<T>(args, task, sums).run();
}

}  // namespace

extern const CrossEntropyTable kCrossEntropyTable;
const CrossEntropyTable kCrossEntropyTable = {cross_entropy_task<float>,
                                              cross_entropy_task<double>};

}  // namespace pydense::PYDENSE_ISA
