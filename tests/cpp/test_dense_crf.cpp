// SPDX-License-Identifier: Apache-2.0
// The lattice against a plain double-precision one on std::map, and mean field against itself over
// threads, instruction sets and ways to call it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "common/thread_pool.h"
#include "dense_crf/mean_field.h"
#include "dense_crf/permutohedral.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::thread_for;

namespace {

std::vector<float> random_floats(size_t n, float scale, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-scale, scale);
  std::vector<float> values(n);
  for (float& value : values) {
    value = uniform(generator);
  }
  return values;
}

Lattice build(const std::vector<float>& features, int dims, ParallelFor parallel_for = thread_for) {
  const auto n = static_cast<int64_t>(features.size()) / dims;
  return build_lattice({features.data(), n, dims, n, 1}, parallel_for);
}

std::vector<float> filter(const Lattice& lattice, const std::vector<float>& values, bool reverse,
                          ParallelFor parallel_for = thread_for) {
  const int64_t n = lattice.view.num_points;
  std::vector<float> out(values.size());
  filter_lattice({&lattice.view, values.data(), out.data(),
                  static_cast<int>(static_cast<int64_t>(values.size()) / n), n, 1, n, 1, reverse},
                 parallel_for);
  return out;
}

// The same filter for one channel, coordinates as vectors of int, arithmetic in double.
std::vector<double> plain_filter(const std::vector<float>& features, int d,
                                 const std::vector<float>& values, bool reverse) {
  using Vertex = std::vector<int>;
  const size_t n = values.size();
  std::vector<std::vector<std::pair<Vertex, double>>> corners(n);
  std::map<Vertex, double> grid;
  for (size_t p = 0; p < n; ++p) {
    std::vector<double> e(static_cast<size_t>(d) + 1, 0.0);
    for (int i = 0; i < d; ++i) {
      const double f = static_cast<double>(features[static_cast<size_t>(i) * n + p]) *
                       std::sqrt(2.0 / 3.0) * (d + 1) / std::sqrt((i + 1.0) * (i + 2.0));
      for (int j = 0; j <= i; ++j) {
        e[static_cast<size_t>(j)] += f;
      }
      e[static_cast<size_t>(i) + 1] -= f * (i + 1);
    }
    Vertex base(e.size());
    std::vector<int> order(e.size());
    std::iota(order.begin(), order.end(), 0);
    int sum = 0;
    for (size_t i = 0; i < e.size(); ++i) {
      base[i] = static_cast<int>(std::nearbyint(e[i] / (d + 1))) * (d + 1);
      sum += base[i] / (d + 1);
    }
    const auto rest = [&](int i) {
      return e[static_cast<size_t>(i)] - base[static_cast<size_t>(i)];
    };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return rest(a) > rest(b); });
    for (; sum > 0; --sum) {  // too high: lower the coordinates with the smallest rest
      base[static_cast<size_t>(order.back())] -= d + 1;
      std::rotate(order.begin(), order.end() - 1, order.end());
    }
    for (; sum < 0; ++sum) {
      base[static_cast<size_t>(order.front())] += d + 1;
      std::rotate(order.begin(), order.begin() + 1, order.end());
    }
    for (int r = 0; r <= d; ++r) {
      Vertex vertex = base;
      for (int i = 0; i <= d; ++i) {
        vertex[static_cast<size_t>(order[static_cast<size_t>(i)])] += i > d - r ? r - (d + 1) : r;
      }
      const double high = r == 0 ? 1.0 + rest(order.back()) / (d + 1)
                                 : rest(order[static_cast<size_t>(d - r)]) / (d + 1);
      const double low = r == 0 ? rest(order.front()) / (d + 1)
                                : rest(order[static_cast<size_t>(d - r) + 1]) / (d + 1);
      corners[p].emplace_back(vertex, high - low);
      grid[vertex] += (high - low) * static_cast<double>(values[p]);
    }
  }
  for (int stage = 0; stage <= d; ++stage) {
    const int axis = reverse ? d - stage : stage;
    std::map<Vertex, double> blurred;
    for (const auto& [vertex, value] : grid) {
      double sides = 0.0;
      for (const int side : {-1, 1}) {
        Vertex neighbour = vertex;
        for (int& coordinate : neighbour) {
          coordinate += side;
        }
        neighbour[static_cast<size_t>(axis)] -= side * (d + 1);
        const auto found = grid.find(neighbour);
        sides += found == grid.end() ? 0.0 : found->second;
      }
      blurred[vertex] = value + 0.5 * sides;
    }
    grid = blurred;
  }
  std::vector<double> out(n, 0.0);
  for (size_t p = 0; p < n; ++p) {
    for (const auto& [vertex, weight] : corners[p]) {
      out[p] += weight * grid[vertex] / (1.0 + std::pow(2.0, -d));
    }
  }
  return out;
}

void test_against_plain_lattice() {
  // The last is wide enough for keys of several words.
  struct Case {
    int dims;
    int64_t points;
    float scale;
  };
  for (const Case& c :
       {Case{1, 50, 10}, Case{2, 400, 8}, Case{3, 300, 5}, Case{5, 300, 3}, Case{7, 100, 20},
        Case{16, 60, 2}, Case{16, 40, 3000}, Case{20, 20, 9000}}) {
    const auto features = random_floats(static_cast<size_t>(c.points * c.dims), c.scale, 7);
    const auto values = random_floats(static_cast<size_t>(c.points), 1, 8);
    const Lattice lattice = build(features, c.dims);
    for (const bool reverse : {false, true}) {
      const auto got = filter(lattice, values, reverse);
      const auto wanted = plain_filter(features, c.dims, values, reverse);
      double top = 0;
      double error = 0;
      for (size_t p = 0; p < wanted.size(); ++p) {
        top = std::max(top, std::fabs(wanted[p]));
        error = std::max(error, std::fabs(wanted[p] - static_cast<double>(got[p])));
      }
      // Barycentric weights carry the rounding of the coordinates.
      const double tolerance = 4e-6 * static_cast<double>(std::max(1.0F, c.scale)) * (c.dims + 1);
      EXPECT(error <= tolerance * top);
    }
  }
}

// Enough points for several bands, in a space small enough that bands share vertices.
constexpr int64_t kManyPoints = 3 * kBandPoints + 17;

void test_same_bits_everywhere() {
  const auto features = random_floats(static_cast<size_t>(kManyPoints) * 3, 4, 1);
  const auto values = random_floats(static_cast<size_t>(kManyPoints) * 5, 1, 2);
  const std::string before = cpu_isa_name(current_cpu_isa());
  const Lattice first = build(features, 3, serial_for);
  const auto expected = filter(first, values, false, serial_for);
  EXPECT(first.view.num_bands > 1 && first.view.num_entries > first.view.num_vertices);
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(cpu_isa_name(isa));
    for (const ParallelFor parallel_for : {serial_for, thread_for, pool_parallel_for}) {
      const Lattice lattice = build(features, 3, parallel_for);
      EXPECT(lattice.view.num_vertices == first.view.num_vertices);
      EXPECT(filter(lattice, values, false, parallel_for) == expected);
    }
  }
  set_cpu_isa(before);
}

void test_transpose() {
  const auto features = random_floats(size_t{500} * 2, 6, 3);
  const auto x = random_floats(500, 1, 4);
  const auto y = random_floats(500, 1, 5);
  const Lattice lattice = build(features, 2);
  const auto kx = filter(lattice, x, false);
  const auto ky = filter(lattice, y, true);
  double a = 0;
  double b = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    a += static_cast<double>(y[i]) * static_cast<double>(kx[i]);
    b += static_cast<double>(ky[i]) * static_cast<double>(x[i]);
  }
  EXPECT(std::fabs(a - b) < 1e-4 * std::fabs(a));
}

void test_lattice_errors() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {nan, inf, -inf, 1e30F, 1e8F}) {
    for (const size_t position : {size_t{0}, size_t{700}, size_t{999}}) {
      auto features = random_floats(1000, 1, 6);
      features[position] = bad;
      EXPECT_THROWS(build(features, 2), "features must be finite and within");
    }
  }
  const std::vector<float> one(40, 0.0F);
  EXPECT_THROWS(build_lattice({one.data(), 1, 33, 1, 1}, serial_for), "1 to 32 dimensions, got 33");
  EXPECT_THROWS(build_lattice({one.data(), 1, 0, 1, 1}, serial_for), "got 0");
  EXPECT_THROWS(build_lattice({one.data(), 0, 2, 1, 1}, serial_for), "at least 1 point");
}

void test_mean_field(int labels) {
  const int64_t n = kBandPoints + 300;
  const auto size = static_cast<size_t>(n * labels);
  const auto unary = random_floats(size, 3, 9);
  const auto positions = random_floats(static_cast<size_t>(n) * 2, 20, 10);
  const auto lattice = std::make_shared<Lattice>(build(positions, 2));
  std::vector<float> diagonal(static_cast<size_t>(labels), -1.5F);
  std::vector<float> matrix(static_cast<size_t>(labels) * static_cast<size_t>(labels), 0.0F);
  for (int l = 0; l < labels; ++l) {
    matrix[static_cast<size_t>(l) * static_cast<size_t>(labels + 1)] = -1.5F;
  }
  const float potts = 1.5F;
  std::vector<std::vector<float>> results;
  const std::pair<Compatibility, const float*> kinds[] = {
      {Compatibility::kPotts, &potts},
      {Compatibility::kDiagonal, diagonal.data()},
      {Compatibility::kMatrix, matrix.data()}};
  for (const auto& [kind, compat] : kinds) {
    MeanField field(n, labels, thread_for);
    field.set_unary({unary.data(), n, 1});
    field.add_pairwise(lattice, kind, compat, Normalization::kSymmetric);
    std::vector<float> fused(size);
    std::vector<float> stepped(size);
    field.run(3, {fused.data(), n, 1});
    field.start({stepped.data(), 1, labels});
    for (int i = 0; i < 3; ++i) {
      field.step({stepped.data(), 1, labels});
    }
    for (int64_t p = 0; p < n; ++p) {
      float sum = 0;
      for (int l = 0; l < labels; ++l) {
        const float q = fused[static_cast<size_t>(l * n + p)];
        EXPECT(q == stepped[static_cast<size_t>(p * labels + l)]);
        sum += q;
      }
      EXPECT(std::fabs(sum - 1.0F) < 1e-5F);
    }
    EXPECT(std::isfinite(field.kl_divergence({fused.data(), n, 1})));
    results.push_back(fused);
  }
  // Potts(w) is the diagonal and the matrix of -w.
  for (size_t i = 0; i < size; ++i) {
    EXPECT(std::fabs(results[0][i] - results[1][i]) < 1e-5F);
    EXPECT(std::fabs(results[0][i] - results[2][i]) < 1e-5F);
  }
}

void test_mean_field_errors() {
  EXPECT_THROWS(MeanField(0, 2, serial_for), "num_points must be at least 1");
  EXPECT_THROWS(MeanField(5, 0, serial_for), "num_labels must be in");
  MeanField field(4, 2, serial_for);
  const float huge[8] = {std::numeric_limits<float>::infinity(), 0, 0, 0,
                         std::numeric_limits<float>::infinity(), 0, 0, 0};
  field.set_unary({huge, 4, 1});
  float q[8];
  EXPECT_THROWS(field.start({q, 4, 1}), "overflow float32");
  EXPECT_THROWS(field.run(-1, {q, 4, 1}), "iterations must be at least 0");
  const auto other = std::make_shared<Lattice>(build({0, 1, 2}, 1));
  const float w = 1;
  EXPECT_THROWS(field.add_pairwise(other, Compatibility::kPotts, &w, Normalization::kNone),
                "features must have 4 points, got 3");
}

}  // namespace

int main() {
  test_against_plain_lattice();
  test_same_bits_everywhere();
  test_transpose();
  test_lattice_errors();
  for (const int labels : {1, 2, 3, 5, 21, 33, 40}) {
    test_mean_field(labels);
  }
  test_mean_field_errors();
  return testing::report("dense_crf");
}
