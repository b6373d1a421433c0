// SPDX-License-Identifier: Apache-2.0
// Cross-entropy of a group of source rows, and what the group adds to the gradient: softmax_tile.h
// with targets and weights.
#include "segmentation_head/softmax_tile.h"

namespace pydense::PYDENSE_ISA {
namespace {

template <class T>
class CrossEntropyTask {
 public:
  CrossEntropyTask(const UpsampleCrossEntropyArgs<T>& args, const HeadTask& task,
                   CrossEntropySums& sums)
      : args_(args),
        task_(task),
        sums_(sums),
        classes_(args.logits.classes),
        miss_plane_(args.smoothing > 0),
        tile_(args.logits, *args.y, *args.x, {args.gradient, args.gradient_channels_last},
              task.image, miss_plane_, args.weight) {
    const auto smoothing = static_cast<T>(args.smoothing);
    hit_ = 1 - smoothing;
    miss_ = smoothing / static_cast<T>(classes_);
    auto weights = static_cast<double>(classes_);
    if (args.weight != nullptr) {
      weights = 0;
      for (int64_t c = 0; c < classes_; ++c) {
        weights += static_cast<double>(args.weight[c]);
      }
    }
    miss_all_ = static_cast<T>(args.smoothing / static_cast<double>(classes_) * weights);
  }

  void run() {
    tile_.run(task_.group, [&](const typename SoftmaxTile<T>::Strip& rows) { strip(rows); });
  }

 private:
  static constexpr int kLanes = SoftmaxTile<T>::kLanes;
  static constexpr int kMaxRows = SoftmaxTile<T>::kMaxRows;
  static constexpr int kStep = SoftmaxTile<T>::kStep;
  using V = Vec<T, kLanes>;
  using Step = Vec<T, kStep>;
  using Strip = typename SoftmaxTile<T>::Strip;
  template <int Rows>
  using Sums = typename SoftmaxTile<T>::template Sums<Rows>;

  // Pixels of one output row of a block. Columns past the end and ignored pixels have target -1.
  struct Pixels {
    int32_t target[kLanes];
    T hit[kLanes];   // what stands before -log p of the target,
    T all[kLanes];   // before the logarithm of the sum,
    T miss[kLanes];  // and before -log p of every class
  };

  void strip(const Strip& rows) {
    const int64_t count = rows.end - rows.begin;
    const int64_t width = tile_.width();
    for (int64_t x = tile_.columns().count() * kLanes; x < width; x += kLanes) {
      for (int64_t r = 0; r < count; ++r) {
        store(losses_ + r * width + x, V{});
      }
    }
    for (int64_t b = 0; b < tile_.columns().count(); ++b) {
      with_constant<kMaxRows>(count, [&](auto n) { block<decltype(n)::value>(rows, b); });
    }
    for (int64_t x = 0; x < count * width; x += kStep) {
      sums_.loss += static_cast<double>(lane_sum<kStep>(load<Step>(losses_ + x)));
    }
    for (double& weight : row_weights_) {
      sums_.weight += weight;
      weight = 0;
    }
  }

  template <int Rows>
  void block(const Strip& rows, int64_t b) {
    Pixels pixels[Rows];
    bool active = false;
    for (int r = 0; r < Rows; ++r) {
      active = read_pixels(rows.begin + r, tile_.columns().begin() + b * kLanes, pixels[r],
                           row_weights_[r]) ||
               active;
    }
    if (!active) {  // ignored pixels take no part, whatever their logits
      for (int r = 0; r < Rows; ++r) {
        put_loss(r, rows.begin + r, b, V{});
      }
      return;
    }
    Sums<Rows> sums;
    if (tile_.has_gradient()) {
      tile_.template exponentials<Rows, true>(rows, b, args_.count_correct, sums);
    } else {
      tile_.template exponentials<Rows, false>(rows, b, args_.count_correct, sums);
    }
    for (int r = 0; r < Rows; ++r) {
      finish_row(rows, b, r, pixels[r], sums.sum[r], sums.largest[r], sums.shift[r]);
    }
    if (tile_.has_gradient()) {
      fall<Rows>(rows, b, pixels, sums.sum);
    }
  }

  // False where no pixel of the row counts.
  bool read_pixels(int64_t y, int64_t x, Pixels& pixels, double& row_weight) {
    const int64_t* const strides = args_.target_strides;
    const int64_t offset = task_.image * strides[0] + y * strides[1] + x * strides[2];
    const int64_t count = std::min<int64_t>(kLanes, tile_.columns().end() - x);
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
      const int64_t label = from[l * stride];  // NOLINT(bugprone-signed-char-misuse): may be < 0
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

  // Loss and counts of one output row.
  void finish_row(const Strip& rows, int64_t b, int r, const Pixels& pixels, const V& sum,
                  const V& largest, const V& shift) {
    const int64_t y = rows.begin + r;
    const T* const upper = tile_.values(rows.top, b);
    const T* const lower = tile_.values(rows.bottom, b);
    const T h0 = *tile_.weights0(y);
    const T h1 = *tile_.weights1(y);
    const int64_t width = tile_.width();
    const V weight_hit = load<V>(pixels.hit);
    const V weight_all = load<V>(pixels.all);
    V target = {};
    for (int l = 0; l < kLanes; ++l) {
      const int32_t t = pixels.target[l];
      if (t >= 0) {
        // As in powers, for the comparison with the largest.
        target[l] = fma(h1, lower[t * width + l], h0 * upper[t * width + l]);
        const bool correct = sum[l] == sum[l] ? target[l] == largest[l]
                                              : t == first_nan(upper + l, lower + l, h0, h1);
        sums_.correct += args_.count_correct && correct ? 1 : 0;
      }
    }
    constexpr T kLn2 = 0.6931471805599453;
    const V log_sum = fma(shift, broadcast<V>(kLn2), log_positive(sum));
    V inner = weight_hit * target;
    if (miss_plane_) {
      const V rest = fma(broadcast<V>(h1), load<V>(lower + classes_ * width),
                         broadcast<V>(h0) * load<V>(upper + classes_ * width));
      inner = fma(load<V>(pixels.miss), rest, inner);
    }
    V loss = fma(weight_all, log_sum, V{} - inner * broadcast<V>(kLn2));
    // Where the pixel has no weight, its NaN or infinity is not asked for.
    loss = ((weight_all == V{}) & (weight_hit == V{})) ? V{} : loss;
    put_loss(r, y, b, loss);
  }

  // The argmax of a pixel whose classes hold NaN, as torch has it.
  int64_t first_nan(const T* upper, const T* lower, T h0, T h1) const {
    for (int64_t c = 0; c < classes_; ++c) {
      const T v = fma(h1, lower[c * tile_.width()], h0 * upper[c * tile_.width()]);
      if (v != v) {
        return c;
      }
    }
    return -1;
  }

  void put_loss(int r, int64_t y, int64_t b, const V& loss) {
    store(losses_ + r * tile_.width() + b * kLanes, loss);
    if (args_.loss != nullptr) {
      const int64_t x = tile_.columns().begin() + b * kLanes;
      const int64_t count = std::min<int64_t>(kLanes, tile_.columns().end() - x);
      std::memcpy(args_.loss + (task_.image * args_.y->size + y) * args_.x->size + x, &loss,
                  static_cast<size_t>(count) * sizeof(T));
    }
  }

  // Adds the gradient of a block's rows to the falls of the two source rows, and takes off what
  // belongs to the targets.
  template <int Rows>
  void fall(const Strip& rows, int64_t b, const Pixels* pixels, const V* sums) {
    T* const upper = tile_.falls(rows.top, b);
    T* const lower = tile_.falls(rows.bottom, b);
    const T* const h0 = tile_.weights0(rows.begin);
    const T* const h1 = tile_.weights1(rows.begin);
    const int64_t width = tile_.width();
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
            tile_.powers()[(c * Rows + r) * kLanes + l] = 0;
          }
        }
      }
    }
    tile_.template fall<Rows>(to_upper, to_lower, upper, lower);
    for (int r = 0; r < Rows; ++r) {
      for (int l = 0; l < kLanes; ++l) {
        const int32_t t = pixels[r].target[l];
        if (t >= 0) {
          upper[t * width + l] -= h0[r] * pixels[r].hit[l];
          lower[t * width + l] -= h1[r] * pixels[r].hit[l];
        }
      }
      if (miss_plane_) {
        const V miss = load<V>(pixels[r].miss);
        T* const above = upper + classes_ * width;
        T* const below = lower + classes_ * width;
        store(above, load<V>(above) + broadcast<V>(h0[r]) * miss);
        store(below, load<V>(below) + broadcast<V>(h1[r]) * miss);
      }
    }
  }

  const UpsampleCrossEntropyArgs<T>& args_;
  const HeadTask& task_;
  CrossEntropySums& sums_;
  int64_t classes_;
  bool miss_plane_;
  SoftmaxTile<T> tile_;
  T hit_;
  T miss_;
  T miss_all_;
  double row_weights_[kMaxRows] = {};
  alignas(64) T losses_[kMaxRows * SoftmaxTile<T>::kMaxWidth];
};

template <class T>
void cross_entropy_task(const UpsampleCrossEntropyArgs<T>& args, const HeadTask& task,
                        CrossEntropySums& sums) {
  CrossEntropyTask<T>(args, task, sums).run();
}

}  // namespace

extern const CrossEntropyTable kCrossEntropyTable;
const CrossEntropyTable kCrossEntropyTable = {cross_entropy_task<float>,
                                              cross_entropy_task<double>};

}  // namespace pydense::PYDENSE_ISA
