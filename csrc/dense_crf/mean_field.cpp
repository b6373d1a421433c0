// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/mean_field.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "common/check.h"

namespace pydense {
namespace {

// Keeps 1 / norm finite where the lattice lost all mass around a point.
constexpr float kNormFloor = 1e-20f;

Buffer lattice_norm(const LatticeView& lattice, Normalization normalization,
                    ParallelFor parallel_for) {
  const auto n = static_cast<size_t>(lattice.num_points);
  Buffer norm = buffer_of<float>(n);
  auto* values = norm.as<float>();
  const float one = 1.0f;
  filter_lattice({&lattice, &one, values, 1, 0, 0, 0, 1, false}, parallel_for);
  for (size_t i = 0; i < n; ++i) {
    const float mass = values[i] + kNormFloor;
    values[i] = normalization == Normalization::kSymmetric ? 1.0f / std::sqrt(mass) : 1.0f / mass;
  }
  return norm;
}

}  // namespace

MeanField::MeanField(int64_t num_points, int num_labels, ParallelFor parallel_for)
    : num_points_(num_points), num_labels_(num_labels), parallel_for_(parallel_for) {
  PYDENSE_CHECK(num_points >= 1, "mean_field: num_points must be at least 1, got ", num_points);
  PYDENSE_CHECK(num_labels >= 1 && num_labels <= 65536,
                "mean_field: num_labels must be in [1, 65536], got ", num_labels);
  width_ = std::max(2, row_width(num_labels));  // a single label still has a softmax to sum
  set_unary({nullptr, 0, 0});
}

void MeanField::set_unary(LabelArray<const float> unary) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (negative_unary_.data() == nullptr) {
    negative_unary_ = buffer_of<float>(
        checked_bytes(static_cast<size_t>(num_points_), static_cast<size_t>(width_)));
  }
  auto* rows = negative_unary_.as<float>();
  const int64_t bands = lattice_bands(num_points_);
  parallel_tasks(parallel_for_, bands, [&](int64_t b) {
    for (int64_t p = band_begin(num_points_, bands, b); p < band_begin(num_points_, bands, b + 1);
         ++p) {
      float* row = rows + p * width_;
      for (int l = 0; l < num_labels_; ++l) {
        row[l] = unary.data == nullptr
                     ? 0.0f
                     : -unary.data[l * unary.label_stride + p * unary.point_stride];
      }
      std::fill(row + num_labels_, row + width_, -std::numeric_limits<float>::infinity());
    }
  });
}

void MeanField::add_pairwise(std::shared_ptr<const Lattice> lattice, Compatibility kind,
                             const float* compat, Normalization normalization) {
  const LatticeView& view = lattice->view;
  PYDENSE_CHECK(view.num_points == num_points_, "mean_field: features must have ", num_points_,
                " points, got ", view.num_points);
  const std::lock_guard<std::mutex> lock(mutex_);
  Term term;
  const auto n = static_cast<size_t>(num_points_);
  const bool before =
      normalization == Normalization::kBefore || normalization == Normalization::kSymmetric;
  const bool after =
      normalization == Normalization::kAfter || normalization == Normalization::kSymmetric;
  Buffer norm;
  if (before || after) {
    norm = lattice_norm(view, normalization, parallel_for_);
  }
  const float factor = view.alpha * (kind == Compatibility::kPotts ? compat[0] : 1.0f);
  term.slice_norm = buffer_of<float>(n);
  for (size_t i = 0; i < n; ++i) {
    term.slice_norm.as<float>()[i] = after ? norm.as<float>()[i] * factor : factor;
  }
  if (before) {
    term.splat_norm = std::move(norm);
  }
  if (kind != Compatibility::kPotts) {
    const int64_t columns = kind == Compatibility::kMatrix ? num_labels_ : 1;
    term.compat =
        buffer_of<float>(checked_bytes(static_cast<size_t>(columns), static_cast<size_t>(width_)));
    auto* values = term.compat.as<float>();
    std::fill(values, values + columns * width_, 0.0f);
    for (int64_t column = 0; column < columns; ++column) {
      for (int l = 0; l < num_labels_; ++l) {
        values[column * width_ + l] = -compat[column * num_labels_ + l];
      }
    }
  }
  term.lattice = std::move(lattice);
  // All or none: a lack of memory must not leave one list longer than another.
  rows_.reserve(rows_.size() + 1);
  views_.reserve(views_.size() + 1);
  terms_.reserve(terms_.size() + 1);
  rows_.push_back({view, width_, nullptr});
  views_.push_back({view, nullptr, nullptr, term.splat_norm.as<float>(),
                    term.slice_norm.as<float>(), kind, term.compat.as<float>()});
  terms_.push_back(std::move(term));
}

PointPass MeanField::pass() const {
  PointPass pass{};
  pass.terms = views_.data();
  pass.num_terms = static_cast<int>(views_.size());
  pass.num_labels = num_labels_;
  pass.width = width_;
  pass.negative_unary = negative_unary_.as<float>();
  return pass;
}

void MeanField::run_pass(PointPass pass) {
  const MeanFieldTable& table =
      select_cpu_table<MeanFieldTable>(PYDENSE_CPU_TABLES(kMeanFieldTable));
  const int64_t bands = lattice_bands(num_points_);
  const Buffer overflow = buffer_of<bool>(static_cast<size_t>(bands));
  std::fill(overflow.as<bool>(), overflow.as<bool>() + bands, false);
  pass.overflow = overflow.as<bool>();
  pass.num_points = num_points_;
  table.point_pass(pass, parallel_for_);
  if (std::find(pass.overflow, pass.overflow + bands, true) != pass.overflow + bands) {
    throw std::invalid_argument(
        "mean_field: the energies of a point overflow float32: unary and compat must be smaller");
  }
}

void MeanField::use_sides(int slice, int splat) {
  for (size_t k = 0; k < terms_.size(); ++k) {
    for (const int side : {slice, splat}) {
      if (terms_[k].rows[side].data() == nullptr) {
        terms_[k].rows[side] = buffer_of<float>(checked_bytes(
            static_cast<size_t>(views_[k].lattice.num_rows()), static_cast<size_t>(width_)));
      }
    }
    views_[k].slice_rows = terms_[k].rows[slice].as<float>();
    views_[k].splat_rows = terms_[k].rows[splat].as<float>();
    rows_[k].rows = views_[k].splat_rows;
  }
}

void MeanField::filter_terms() {
  permutohedral_table().merge_and_blur(rows_.data(), static_cast<int>(rows_.size()), false,
                                       parallel_for_);
}

void MeanField::start(LabelArray<float> q) { run(0, q); }

void MeanField::run(int iterations, LabelArray<float> q) {
  PYDENSE_CHECK(iterations >= 0, "mean_field: iterations must be at least 0, got ", iterations);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (iterations > 1 && !fuse_iterations()) {
    // q serves as the store of the distribution between the iterations.
    update(q, false);
    for (int i = 0; i < iterations; ++i) {
      filter_distribution({q.data, q.label_stride, q.point_stride});
      update(q, true);
    }
    return;
  }
  // Each pass but the last splats its Q at once, so that Q is never stored in between.
  for (int i = 0; i < iterations; ++i) {
    use_sides(iterations > 1 ? (i + 1) % 2 : 0, iterations > 1 ? i % 2 : 0);
    PointPass point_pass = pass();
    point_pass.messages = i > 0;
    point_pass.splat = true;
    run_pass(point_pass);
    filter_terms();
  }
  if (iterations > 0) {
    const int last = iterations > 1 ? (iterations - 1) % 2 : 0;
    use_sides(last, last);
  }
  update(q, iterations > 0);
}

// Fused iterations need a second set of rows. On large lattices that costs more memory and cache
// than storing Q.
bool MeanField::fuse_iterations() const {
  int64_t rows = 0;
  for (const PairwiseView& view : views_) {
    rows += view.lattice.num_rows();
  }
  return rows <= num_points_;
}

void MeanField::update(LabelArray<float> q, bool messages) {
  PointPass update = pass();
  update.messages = messages;
  update.q_out = q;
  run_pass(update);
}

void MeanField::step(LabelArray<float> q) {
  const std::lock_guard<std::mutex> lock(mutex_);
  filter_distribution({q.data, q.label_stride, q.point_stride});
  update(q, true);
}

void MeanField::filter_distribution(LabelArray<const float> q) {
  use_sides(0, 0);
  PointPass load = pass();
  load.q_in = q;
  load.splat = true;
  run_pass(load);
  filter_terms();
}

double MeanField::kl_divergence(LabelArray<const float> q) {
  const std::lock_guard<std::mutex> lock(mutex_);
  filter_distribution(q);
  const int64_t bands = lattice_bands(num_points_);
  std::vector<double> sums(static_cast<size_t>(bands), 0.0);
  PointPass measure = pass();
  measure.q_in = q;
  measure.messages = true;
  measure.divergence = sums.data();
  run_pass(measure);
  double sum = 0.0;
  for (const double band : sums) {
    sum += band;
  }
  return sum;
}

}  // namespace pydense
