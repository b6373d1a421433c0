// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/mean_field.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "common/check.h"

namespace pydense {
namespace {

template <class T>
const MeanFieldTable<T>& mean_field_table() {
  if constexpr (std::is_same_v<T, float>) {
    return select_cpu_table<MeanFieldTable<T>>(PYDENSE_CPU_TABLES(kMeanFieldTable));
  } else {
    return select_cpu_table<MeanFieldTable<T>>(PYDENSE_CPU_TABLES(kMeanFieldTable64));
  }
}

}  // namespace

template <class T>
MeanField<T>::MeanField(const PointGrid& grid, int num_labels, ParallelFor parallel_for)
    : grid_(grid), num_labels_(num_labels), parallel_for_(parallel_for) {
  PYDENSE_CHECK(grid.points() >= 1, "mean_field: num_points must be at least 1, got ",
                grid.points());
  PYDENSE_CHECK(num_labels >= 1 && num_labels <= 65536,
                "mean_field: num_labels must be in [1, 65536], got ", num_labels);
  width_ = std::max(2, row_width(num_labels));  // a single label still has a softmax to sum
}

template <class T>
void MeanField<T>::set_unary(LabelArray<const T> unary, bool energies) {
  const std::lock_guard<std::mutex> lock(mutex_);
  unary_ = unary;
  energies_ = energies;
}

template <class T>
void MeanField<T>::add_pairwise(const LatticeView<T>& lattice, Compatibility kind,
                                const T* compat) {
  PYDENSE_CHECK(lattice.num_points() == num_points(), "mean_field: features must have ",
                num_points(), " points, got ", lattice.num_points());
  PYDENSE_CHECK(lattice.grid.width == grid_.width, "mean_field: features must have a width of ",
                grid_.width, " pixels, got ", lattice.grid.width);
  const std::lock_guard<std::mutex> lock(mutex_);
  Term term;
  if (kind != Compatibility::kPotts) {
    const int64_t columns = kind == Compatibility::kMatrix ? num_labels_ : 1;
    term.compat =
        buffer_of<T>(checked_bytes(static_cast<size_t>(columns), static_cast<size_t>(width_)));
    auto* values = term.compat.template as<T>();
    std::fill(values, values + columns * width_, T{0});
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t l = 0; l < num_labels_; ++l) {
        values[column * width_ + l] =
            kind == Compatibility::kMatrix ? compat[l * num_labels_ + column] : compat[l];
      }
    }
  }
  const T weight = kind == Compatibility::kPotts ? compat[0] : T{1};
  // All or none: a lack of memory must not leave one list longer than another.
  rows_.reserve(rows_.size() + 1);
  views_.reserve(views_.size() + 1);
  terms_.reserve(terms_.size() + 1);
  rows_.push_back({lattice, width_, nullptr});
  views_.push_back(
      {lattice, nullptr, weight * lattice.scale, weight, kind, term.compat.template as<T>()});
  terms_.push_back(std::move(term));
}

template <class T>
PointPass<T> MeanField<T>::pass() {
  PointPass<T> pass{};
  pass.terms = views_.data();
  pass.num_terms = static_cast<int>(views_.size());
  pass.grid = grid_;
  pass.num_labels = num_labels_;
  pass.width = width_;
  pass.unary = unary_;
  pass.energies = energies_;
  pass.workspace = &workspace_;
  return pass;
}

template <class T>
void MeanField<T>::run_pass(PointPass<T> pass) {
  const int64_t bands = BandGrid(grid_).count();
  const Buffer overflow = buffer_of<bool>(static_cast<size_t>(bands));
  std::fill(overflow.as<bool>(), overflow.as<bool>() + bands, false);
  pass.overflow = overflow.as<bool>();
  mean_field_table<T>().point_pass(pass, parallel_for_);
  PYDENSE_CHECK(std::find(pass.overflow, pass.overflow + bands, true) == pass.overflow + bands,
                "mean_field: the energies of a point overflow float", 8 * sizeof(T),
                ": unary and compat must be smaller");
}

template <class T>
void MeanField<T>::make_rows() {
  for (size_t k = 0; k < terms_.size(); ++k) {
    if (terms_[k].rows.data() == nullptr) {
      terms_[k].rows = buffer_of<T>(checked_bytes(static_cast<size_t>(views_[k].lattice.num_rows),
                                                  static_cast<size_t>(width_)));
    }
    views_[k].rows = terms_[k].rows.template as<T>();
    rows_[k].rows = views_[k].rows;
  }
}

// Small lattices side by side, each by one thread: waking threads for every axis would take longer.
// Large ones one by one, so that each stays in the cache from its first axis to its last.
template <class T>
void MeanField<T>::filter_terms(bool reverse) {
  constexpr int64_t kLargeBytes = int64_t{4} << 20;
  int64_t bytes = 0;
  for (const PairwiseView<T>& view : views_) {
    bytes += view.lattice.num_rows * width_ * int64_t{sizeof(T)};
  }
  const auto& table = permutohedral_table<T>();
  const auto count = static_cast<int64_t>(rows_.size());
  if (bytes <= kLargeBytes) {
    parallel_tasks(parallel_for_, count, [&](int64_t k) {
      table.merge_and_blur(rows_[static_cast<size_t>(k)], reverse, serial_for);
    });
    return;
  }
  for (const LatticeRows<T>& rows : rows_) {
    table.merge_and_blur(rows, reverse, parallel_for_);
  }
}

template <class T>
void MeanField<T>::run(int iterations, LabelArray<const T> q, const MeanFieldResult<T>& result,
                       T* kept) {
  const int least = q.data == nullptr ? 0 : 1;
  PYDENSE_CHECK(iterations >= least, "mean_field: iterations must be at least ", least, ", got ",
                iterations);
  const std::lock_guard<std::mutex> lock(mutex_);
  iterate(iterations, q, &result, kept, iterations);
}

template <class T>
void MeanField<T>::keep_distributions(int iterations, LabelArray<const T> q, T* kept) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (iterations > 0) {
    iterate(iterations - 1, q, nullptr, kept, iterations);
  }
}

template <class T>
void MeanField<T>::iterate(int last, LabelArray<const T> q, const MeanFieldResult<T>* result,
                           T* kept, int num_kept) {
  const bool given = q.data != nullptr;
  if (last > 0) {
    make_rows();
  }
  // Taking out a point's own share needs the Q that its message stems from; otherwise Q is not
  // stored between the iterations.
  MeanFieldResult<T> stored{};
  Buffer storage;
  if (kept == nullptr) {
    stored = *result;
    if (last > (given ? 1 : 0) && takes_self() && result->kind != MeanFieldOutput::kProbabilities) {
      storage = buffer_of<T>(
          checked_bytes(static_cast<size_t>(num_points()), static_cast<size_t>(num_labels_)));
      stored = {MeanFieldOutput::kProbabilities, {storage.as<T>(), 1, num_labels_}, nullptr};
    }
  }
  const Buffer unary_rows = make_unary_rows(last);
  const int first = given ? 1 : 0;  // that reads the unary
  for (int i = 0; i <= last; ++i) {
    PointPass<T> point_pass = pass();
    point_pass.q_in = q;
    point_pass.compute = i >= first;
    point_pass.unary_rows = unary_rows.template as<T>();
    point_pass.fill_unary_rows = i == first;
    point_pass.messages = i > 0;
    point_pass.splat = i < last;
    if (i < num_kept && kept != nullptr) {
      point_pass.kept = kept + i * num_points() * width_;
      q = {point_pass.kept, 1, width_};
    }
    if (i == last) {
      point_pass.out = result;
    } else if (kept == nullptr && takes_self() && point_pass.compute) {
      point_pass.out = &stored;
      q = {stored.q.data, stored.q.label_stride, stored.q.point_stride};
    }
    run_pass(point_pass);
    if (i < last) {
      filter_terms(false);
    }
  }
}

template <class T>
Buffer MeanField<T>::make_unary_rows(int passes) const {
  int64_t rows = 0;
  for (const PairwiseView<T>& view : views_) {
    rows += view.lattice.num_rows;
  }
  const bool many_planes = unary_.data != nullptr && unary_.label_stride != 1 && num_labels_ > 8;
  if (passes < 3 || !many_planes || 3 * rows > 2 * num_points()) {
    return {};
  }
  const size_t values =
      checked_bytes(static_cast<size_t>(num_points()), static_cast<size_t>(num_labels_));
  return buffer_of<T>(values + static_cast<size_t>(width_));  // load_rows reads on
}

template <class T>
bool MeanField<T>::takes_self() const {
  return std::any_of(views_.begin(), views_.end(),
                     [](const PairwiseView<T>& view) { return view.lattice.self != nullptr; });
}

template <class T>
void MeanField<T>::filter_distribution(LabelArray<const T> q) {
  make_rows();
  PointPass<T> load = pass();
  load.q_in = q;
  load.splat = true;
  run_pass(load);
  filter_terms(false);
}

template <class T>
FreeEnergy MeanField<T>::free_energy(LabelArray<const T> q) {
  const std::lock_guard<std::mutex> lock(mutex_);
  filter_distribution(q);
  const int64_t bands = BandGrid(grid_).count();
  std::vector<FreeEnergy> sums(static_cast<size_t>(bands));
  PointPass<T> measure = pass();
  measure.q_in = q;
  measure.messages = true;
  measure.free_energy = sums.data();
  run_pass(measure);
  FreeEnergy total{};
  for (const FreeEnergy& band : sums) {
    total.negative_entropy += band.negative_entropy;
    total.unary += band.unary;
    total.pairwise += band.pairwise;
  }
  return total;
}

template class MeanField<float>;
template class MeanField<double>;

}  // namespace pydense
