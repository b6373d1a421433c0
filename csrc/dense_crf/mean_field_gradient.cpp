// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/mean_field_gradient.h"

#include <algorithm>
#include <type_traits>

namespace pydense {
namespace {

template <class T>
const MeanFieldGradientTable<T>& gradient_table() {
  if constexpr (std::is_same_v<T, float>) {
    return select_cpu_table<MeanFieldGradientTable<T>>(PYDENSE_CPU_TABLES(kMeanFieldGradientTable));
  } else {
    return select_cpu_table<MeanFieldGradientTable<T>>(
        PYDENSE_CPU_TABLES(kMeanFieldGradientTable64));
  }
}

// The bands' sums of P_k Q^T, and the compatibilities in the order that transposed products need.
template <class T>
class CompatibilityGradients {
 public:
  CompatibilityGradients(const std::vector<PairwiseView<T>>& views, int labels, int width,
                         int64_t bands)
      : views_(views), labels_(labels), width_(width), bands_(bands) {
    for (const PairwiseView<T>& view : views_) {
      begin_.push_back(band_sums_);
      const bool matrix = view.compatibility == Compatibility::kMatrix;
      band_sums_ += static_cast<int64_t>(matrix ? labels : 1) * width;
      transposed_.push_back(buffer_of<T>(matrix ? static_cast<size_t>(labels) * width : 0));
      pointers_.push_back(transposed_.back().template as<T>());
      if (matrix) {
        T* to = transposed_.back().template as<T>();
        std::fill(to, to + int64_t{labels} * width, T{0});
        for (int64_t l = 0; l < labels; ++l) {
          for (int64_t m = 0; m < labels; ++m) {
            to[l * width + m] = view.compat[m * width + l];
          }
        }
      }
    }
    sums_ = buffer_of<double>(
        checked_bytes(static_cast<size_t>(band_sums_), static_cast<size_t>(bands)));
    std::fill(sums_.template as<double>(), sums_.template as<double>() + band_sums_ * bands, 0.0);
  }

  void put_in(GradientPass<T>& pass) const {
    pass.transposed = pointers_.data();
    pass.sums = sums_.template as<double>();
    pass.sum_begin = begin_.data();
    pass.band_sums = band_sums_;
  }

  // Adds up the bands, in their order.
  void write(T* const* to) const {
    for (size_t k = 0; k < views_.size(); ++k) {
      const Compatibility kind = views_[k].compatibility;
      const int64_t rows = kind == Compatibility::kMatrix ? labels_ : 1;
      double potts = 0.0;
      for (int64_t l = 0; l < rows; ++l) {
        for (int64_t m = 0; m < labels_; ++m) {
          double sum = 0.0;
          for (int64_t b = 0; b < bands_; ++b) {
            sum += sums_.template as<double>()[b * band_sums_ + begin_[k] + l * width_ + m];
          }
          potts += sum;
          if (kind != Compatibility::kPotts) {
            to[k][l * labels_ + m] = static_cast<T>(sum);
          }
        }
      }
      if (kind == Compatibility::kPotts) {
        to[k][0] = static_cast<T>(potts);
      }
    }
  }

 private:
  const std::vector<PairwiseView<T>>& views_;
  int64_t labels_;
  int64_t width_;
  int64_t bands_;
  int64_t band_sums_ = 0;
  std::vector<int64_t> begin_;
  std::vector<Buffer> transposed_;
  std::vector<const T*> pointers_;
  Buffer sums_;
};

}  // namespace

template <class T>
void MeanField<T>::backward(const MeanFieldGradient<T>& gradient) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t row_values = num_points() * width_;
  const int last = gradient.iterations;
  if (last > 0) {
    make_rows();
  }
  const CompatibilityGradients<T> compats(views_, num_labels_, width_, BandGrid(grid_).count());
  const auto rows = [&](bool needed) {
    return buffer_of<T>(
        needed ? checked_bytes(static_cast<size_t>(num_points()), static_cast<size_t>(width_)) : 0);
  };
  const Buffer total = rows(last > 0);
  const bool own_step = last > 0 && takes_self() && gradient.steps == nullptr;
  const Buffer step = rows(own_step);
  for (int t = last; t >= 0; --t) {
    GradientPass<T> pass{};
    pass.terms = views_.data();
    pass.num_terms = static_cast<int>(views_.size());
    pass.grid = grid_;
    pass.num_labels = num_labels_;
    pass.width = width_;
    pass.workspace = &workspace_;
    compats.put_in(pass);
    pass.total = last > 0 ? total.as<T>() : nullptr;
    pass.first = t == last;
    pass.splat = t > 0;
    pass.softmax = true;
    if (t == last) {
      pass.grad = gradient.grad;
      pass.q = gradient.result;
      pass.softmax = gradient.result.data != nullptr;
    } else {
      pass.q_rows = gradient.kept + t * row_values;
      pass.later =
          own_step ? step.as<T>() : (takes_self() ? gradient.steps + t * row_values : nullptr);
    }
    if (t > 0) {
      pass.step = own_step ? step.as<T>()
                           : (gradient.steps ? gradient.steps + (t - 1) * row_values : nullptr);
    } else {
      pass.out = gradient.unary;
      pass.sign = energies_ ? T{-1} : T{1};
      pass.q_out = gradient.q;
    }
    gradient_table<T>().gradient_pass(pass, parallel_for_);
    if (t > 0) {
      filter_terms(true);
    }
  }
  compats.write(gradient.compats);
}

template void MeanField<float>::backward(const MeanFieldGradient<float>&);
template void MeanField<double>::backward(const MeanFieldGradient<double>&);

}  // namespace pydense
