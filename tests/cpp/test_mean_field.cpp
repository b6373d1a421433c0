// SPDX-License-Identifier: Apache-2.0
// Mean field against itself over ways to call it and to say the same.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "dense_crf/feature_gradient.h"
#include "dense_crf/mean_field.h"
#include "lattices.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::build;
using testing::Lattice;
using testing::random_floats;
using testing::thread_for;

namespace {

void test_mean_field(int labels, bool self_term) {
  const int64_t n = kBandPoints + 300;
  const auto size = static_cast<size_t>(n * labels);
  const auto unary = random_floats(size, 3, 9);
  const auto positions = random_floats(static_cast<size_t>(n) * 2, 20, 10);
  const Lattice lattice = build(positions, 2, thread_for, {Normalization::kSymmetric, self_term});
  std::vector<float> diagonal(static_cast<size_t>(labels), 1.5F);
  std::vector<float> matrix(static_cast<size_t>(labels) * static_cast<size_t>(labels), 0.0F);
  for (int l = 0; l < labels; ++l) {
    matrix[static_cast<size_t>(l) * static_cast<size_t>(labels + 1)] = 1.5F;
  }
  const float potts = 1.5F;
  std::vector<std::vector<float>> results;
  const std::pair<Compatibility, const float*> kinds[] = {
      {Compatibility::kPotts, &potts},
      {Compatibility::kDiagonal, diagonal.data()},
      {Compatibility::kMatrix, matrix.data()}};
  for (const auto& [kind, compat] : kinds) {
    MeanField<float> field({1, n}, labels, thread_for);
    field.set_unary({unary.data(), n, 1}, true);
    field.add_pairwise(lattice.view, kind, compat);
    std::vector<float> fused(size);
    std::vector<float> stepped(size);
    std::vector<int64_t> best(static_cast<size_t>(n));
    field.run(3, {}, {MeanFieldOutput::kProbabilities, {fused.data(), n, 1}, nullptr});
    field.run(3, {}, {MeanFieldOutput::kLabels, {}, best.data()});
    const MeanFieldResult<float> step = {
        MeanFieldOutput::kProbabilities, {stepped.data(), 1, labels}, nullptr};
    field.run(0, {}, step);
    for (int i = 0; i < 3; ++i) {
      field.run(1, {stepped.data(), 1, labels}, step);
    }
    for (int64_t p = 0; p < n; ++p) {
      float sum = 0;
      for (int l = 0; l < labels; ++l) {
        const float q = fused[static_cast<size_t>(l * n + p)];
        EXPECT(q == stepped[static_cast<size_t>(p * labels + l)]);
        EXPECT(q <= fused[static_cast<size_t>(best[static_cast<size_t>(p)] * n + p)]);
        sum += q;
      }
      EXPECT(std::fabs(sum - 1.0F) < 1e-5F);
    }
    const FreeEnergy energy = field.free_energy({fused.data(), n, 1});
    EXPECT(energy.negative_entropy <= 0 && energy.pairwise < 0 && std::isfinite(energy.unary));
    results.push_back(fused);
  }
  // Potts(w) is the diagonal and the matrix of w.
  for (size_t i = 0; i < size; ++i) {
    EXPECT(std::fabs(results[0][i] - results[1][i]) < 1e-5F);
    EXPECT(std::fabs(results[0][i] - results[2][i]) < 1e-5F);
  }
}

// The derivatives of Potts, diagonal and matrix compatibilities are sums of each other, those by
// the logits of a point add up to 0, and threads do not matter.
void test_backward(int labels, bool self_term) {
  const int64_t n = kBandPoints + 300;
  const auto size = static_cast<size_t>(n * labels);
  const auto count = static_cast<size_t>(labels);
  const auto unary = random_floats(size, 1, 9);
  const auto grad = random_floats(size, 1, 11);
  const auto positions = random_floats(static_cast<size_t>(n) * 2, 20, 10);
  const Lattice lattice = build(positions, 2, thread_for, {Normalization::kSymmetric, self_term});
  std::vector<float> compat(count * count, 0.0F);
  std::vector<std::vector<float>> by_compat;
  for (const auto kind :
       {Compatibility::kPotts, Compatibility::kDiagonal, Compatibility::kMatrix}) {
    for (size_t l = 0; l < count; ++l) {
      compat[kind == Compatibility::kMatrix ? l * (count + 1) : l] = 1.5F;
    }
    std::vector<float> of_unary[2];
    for (const ParallelFor threads : {ParallelFor(serial_for), ParallelFor(thread_for)}) {
      MeanField<float> field({1, n}, labels, threads);
      field.set_unary({unary.data(), n, 1}, false);
      field.add_pairwise(lattice.view, kind, compat.data());
      const auto rows = static_cast<size_t>(3 * n * field.row_values());
      std::vector<float> kept(rows);
      std::vector<float> again(rows);
      std::vector<float> steps(rows);
      std::vector<float> q(size);
      field.run(3, {}, {MeanFieldOutput::kProbabilities, {q.data(), n, 1}, nullptr}, kept.data());
      field.keep_distributions(3, {}, again.data());
      EXPECT(kept == again);
      std::vector<float> of_compat(count * count);
      float* const to_compat = of_compat.data();
      std::vector<float>& to = of_unary[threads == ParallelFor(serial_for) ? 0 : 1];
      to.resize(size);
      field.backward({3,
                      {grad.data(), n, 1},
                      {q.data(), n, 1},
                      kept.data(),
                      {to.data(), n, 1},
                      {},
                      labels % 2 == 0 ? steps.data() : nullptr,
                      &to_compat});
      by_compat.push_back(of_compat);
    }
    EXPECT(of_unary[0] == of_unary[1] && by_compat.back() == by_compat[by_compat.size() - 2]);
    for (int64_t p = 0; p < n; ++p) {
      float sum = 0;
      float most = 1;
      for (int l = 0; l < labels; ++l) {
        const float value = of_unary[0][static_cast<size_t>(l * n + p)];
        sum += value;
        most = std::fmax(most, std::fabs(value));
      }
      EXPECT(std::fabs(sum) < 1e-4F * most);
    }
    std::fill(compat.begin(), compat.end(), 0.0F);
  }
  double diagonal = 0;
  double trace = 0;
  double size_of_sum = 1;
  for (size_t l = 0; l < count; ++l) {
    diagonal += static_cast<double>(by_compat[2][l]);
    trace += static_cast<double>(by_compat[4][l * (count + 1)]);
    size_of_sum += std::fabs(static_cast<double>(by_compat[2][l]));
  }
  const auto potts = static_cast<double>(by_compat[0][0]);
  EXPECT(std::fabs(potts - diagonal) < 1e-3 * size_of_sum);
  EXPECT(std::fabs(potts - trace) < 1e-3 * size_of_sum);
}

// Moving all features together changes no kernel: the gradient's sum over the points is 0.
void test_feature_gradient(int dims, Normalization normalization, bool self_term) {
  constexpr int kChannels = 7;
  const int64_t n = 700;
  // Near enough for points to have neighbours: alone, all that is left is rounding error.
  const auto spread = 3 / static_cast<float>(dims);
  const auto features = random_floats(static_cast<size_t>(n * dims), spread, 12);
  const auto a = random_floats(static_cast<size_t>(n) * kChannels, 1, 13);
  const auto b = random_floats(static_cast<size_t>(n) * kChannels, 1, 14);
  const Lattice lattice = build(features, dims, thread_for, {normalization, self_term});
  for (const bool of_lattice : {false, true}) {
    std::vector<float> out(static_cast<size_t>(n * dims));
    const FeatureGradientArgs<float> args = {
        &lattice.view, features.data(), n,  1,          {a.data(), n, 1}, {b.data(), 1, kChannels},
        kChannels,     nullptr,         {}, of_lattice, out.data()};
    if (of_lattice && !self_term) {
      EXPECT_THROWS(feature_gradient(args, thread_for), "self_term=True");
      continue;
    }
    feature_gradient(args, thread_for);
    for (int m = 0; m < dims && !of_lattice; ++m) {
      double sum = 0;
      double most = 0;
      for (int64_t p = 0; p < n; ++p) {
        const auto value = static_cast<double>(out[static_cast<size_t>(m * n + p)]);
        sum += value;
        most += std::fabs(value);
      }
      EXPECT(most > 0 && std::fabs(sum) < 1e-4 * most);
    }
  }
}

void test_mean_field_errors() {
  EXPECT_THROWS(MeanField<float>({1, 0}, 2, serial_for), "num_points must be at least 1");
  EXPECT_THROWS(MeanField<float>({1, 5}, 0, serial_for), "num_labels must be in");
  MeanField<float> field({1, 4}, 2, serial_for);
  const float inf = std::numeric_limits<float>::infinity();
  const float huge[8] = {inf, 0, 0, 0, inf, 0, 0, 0};
  field.set_unary({huge, 4, 1}, true);
  float q[8] = {};
  const LabelArray<const float> earlier = {q, 4, 1};
  for (const MeanFieldOutput kind : {MeanFieldOutput::kProbabilities, MeanFieldOutput::kLogits}) {
    EXPECT_THROWS(field.run(0, {}, {kind, {q, 4, 1}, nullptr}), "overflow float32");
  }
  const MeanFieldResult<float> result = {MeanFieldOutput::kProbabilities, {q, 4, 1}, nullptr};
  EXPECT_THROWS(field.run(-1, {}, result), "iterations must be at least 0");
  EXPECT_THROWS(field.run(0, earlier, result), "iterations must be at least 1");
  const Lattice other = build({0, 1, 2}, 1);
  const float w = 1;
  EXPECT_THROWS(field.add_pairwise(other.view, Compatibility::kPotts, &w),
                "features must have 4 points, got 3");
  const Lattice square = build({0, 1, 2, 3}, 1, serial_for, {Normalization::kNone, true}, 2);
  EXPECT_THROWS(field.add_pairwise(square.view, Compatibility::kPotts, &w), "width of 4 pixels");
}

}  // namespace

int main() {
  for (const int labels : {1, 2, 3, 5, 21, 33, 40}) {
    test_mean_field(labels, true);
    test_mean_field(labels, false);
    test_backward(labels, true);
    test_backward(labels, false);
  }
  for (const auto normalization : {Normalization::kNone, Normalization::kBefore,
                                   Normalization::kAfter, Normalization::kSymmetric}) {
    for (const int dims : {1, 2, 5, 32}) {
      test_feature_gradient(dims, normalization, true);
      test_feature_gradient(dims, normalization, false);
    }
  }
  test_mean_field_errors();
  return testing::report("mean_field");
}
