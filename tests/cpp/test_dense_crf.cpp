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
#include "dense_crf/lattice_bytes.h"
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

struct Lattice {
  Buffer bytes;
  LatticeView<float> view{};
};

// width: of a picture, or 0 for points without an order.
Lattice build(const std::vector<float>& features, int dims, ParallelFor parallel_for = thread_for,
              LatticeOptions options = {Normalization::kNone, true}, int64_t width = 0) {
  const auto n = static_cast<int64_t>(features.size()) / std::max(dims, 1);
  Lattice lattice;
  const ByteSink sink = {&lattice.bytes, [](void* bytes, size_t size) {
                           *static_cast<Buffer*>(bytes) = Buffer(size);
                           return static_cast<Buffer*>(bytes)->data();
                         }};
  const PointGrid grid = width == 0 ? PointGrid{1, n} : PointGrid{n / width, width};
  build_lattice<float>({features.data(), grid, dims, n, 1}, options, sink, parallel_for);
  lattice.view = lattice_at<float>(lattice.bytes.data(), 0);
  return lattice;
}

std::vector<float> filter(const Lattice& lattice, const std::vector<float>& values, bool reverse,
                          ParallelFor parallel_for = thread_for) {
  const int64_t n = lattice.view.num_points();
  std::vector<float> out(values.size());
  filter_lattice<float>(
      {&lattice.view, values.data(), out.data(),
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
  const auto fused = filter(first, values, false, serial_for);
  EXPECT(BandGrid(first.view.grid).count() > 1 && first.view.num_rows > first.view.num_vertices);
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(cpu_isa_name(isa));
    // The baseline has no fused multiply-add and rounds differently.
    const auto expected =
        isa == CpuIsa::kBaseline ? filter(first, values, false, serial_for) : fused;
    for (const ParallelFor parallel_for : {serial_for, thread_for, pool_parallel_for}) {
      const Lattice lattice = build(features, 3, parallel_for);
      EXPECT(lattice.bytes.bytes() == first.bytes.bytes() &&
             std::memcmp(lattice.bytes.data(), first.bytes.data(), first.bytes.bytes()) == 0);
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
  const std::vector<float> one(33, 0.0F);
  EXPECT_THROWS(build(one, 33), "1 to 32 dimensions, got 33");
  EXPECT_THROWS(build(one, 0), "got 0");
  EXPECT_THROWS(build({}, 2), "at least 1 point");
}

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

// Bands of any picture: every pixel is in one of them, in an order without gaps.
void test_bands() {
  for (const PointGrid grid :
       {PointGrid{1, 1}, PointGrid{1, 100'000}, PointGrid{100'000, 1}, PointGrid{321, 481},
        PointGrid{500, 64}, PointGrid{2000, 63}, PointGrid{64, 20'011}, PointGrid{129, 129}}) {
    std::vector<int> seen(static_cast<size_t>(grid.points()), 0);
    const BandGrid bands(grid);
    int64_t next = 0;
    for (int64_t b = 0; b < bands.count(); ++b) {
      const Band band = bands.at(b);
      EXPECT(band.begin == next && band.end() - band.begin <= kBandPoints);
      std::vector<Run> runs;
      for_each_run(band, 16, [&](const Run& run) {
        EXPECT(run.point == next && run.count >= 1 && run.count <= 16);
        next += run.count;
        for (int64_t i = 0; i < run.count; ++i) {
          ++seen[static_cast<size_t>(run.pixel + i)];
        }
        runs.push_back(run);
      });
      for (size_t i = 0; i + 2 < runs.size() && band.width >= 32; ++i) {
        EXPECT(runs[i + 2].pixel == runs[i].pixel + runs[i].ahead);
      }
    }
    EXPECT(next == grid.points());
    EXPECT(std::count(seen.begin(), seen.end(), 1) == grid.points());
  }
}

// A picture's order of points changes no result but by rounding.
void test_pictures() {
  constexpr int64_t kWidth = 150;
  const auto features = random_floats(static_cast<size_t>(kWidth) * 200 * 3, 4, 13);
  const auto values = random_floats(static_cast<size_t>(kWidth) * 200 * 2, 1, 14);
  for (const bool self_term : {true, false}) {
    const LatticeOptions options = {Normalization::kSymmetric, self_term};
    const Lattice points = build(features, 3, thread_for, options);
    const Lattice picture = build(features, 3, thread_for, options, kWidth);
    EXPECT(points.view.num_vertices == picture.view.num_vertices);
    const auto expected = filter(points, values, false);
    const auto got = filter(picture, values, false);
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT(std::fabs(got[i] - expected[i]) < 2e-5F);
    }
  }
}

// Every column of the filter by a unit vector; without the self term its diagonal has to vanish.
void test_self_term() {
  for (const int dims : {1, 2, 4, 5, 7}) {
    const int64_t n = 40;
    const auto features = random_floats(static_cast<size_t>(n * dims), 2, 11);
    const Lattice with = build(features, dims);
    const Lattice without = build(features, dims, thread_for, {Normalization::kNone, false});
    for (int64_t i = 0; i < n; ++i) {
      std::vector<float> unit(static_cast<size_t>(n), 0.0F);
      unit[static_cast<size_t>(i)] = 1;
      const auto full = filter(with, unit, false);
      const auto rest = filter(without, unit, false);
      for (int64_t j = 0; j < n; ++j) {
        const auto at = static_cast<size_t>(j);
        EXPECT(j == i ? full[at] > 0 && std::fabs(rest[at]) < 2e-6F : rest[at] == full[at]);
      }
    }
  }
}

// Lattices of other bytes, and several in a row.
void test_bytes() {
  const Lattice lattice = build(random_floats(300, 3, 12), 3);
  const size_t size = lattice.bytes.bytes();
  EXPECT(count_lattices<float>("test", lattice.bytes.data(), size) == 1);
  EXPECT(count_lattices<float>("test", lattice.bytes.data(), 0) == 0);
  EXPECT_THROWS(count_lattices<double>("test", lattice.bytes.data(), size), "dtype float64");
  EXPECT_THROWS(count_lattices<float>("test", lattice.bytes.data(), size - 64), "other bytes");
  EXPECT_THROWS(count_lattices<float>("test", lattice.bytes.data(), 8), "other bytes");
  const Buffer both = Buffer(2 * size);
  std::memcpy(both.data(), lattice.bytes.data(), size);
  std::memcpy(both.as<char>() + size, lattice.bytes.data(), size);
  EXPECT(count_lattices<float>("test", both.data(), 2 * size) == 2);
  const LatticeView<float> second = lattice_at<float>(both.data(), 1);
  EXPECT(second.num_rows == lattice.view.num_rows && second.weights[7] == lattice.view.weights[7]);
  EXPECT_THROWS(count_lattices<float>("test", both.as<char>() + 4, size), "multiple of 64");
  both.as<char>()[size] ^= 1;
  EXPECT_THROWS(count_lattices<float>("test", both.data(), 2 * size), "other bytes");
}

}  // namespace

int main() {
  test_against_plain_lattice();
  test_same_bits_everywhere();
  test_transpose();
  test_lattice_errors();
  for (const int labels : {1, 2, 3, 5, 21, 33, 40}) {
    test_mean_field(labels, true);
    test_mean_field(labels, false);
  }
  test_bands();
  test_pictures();
  test_self_term();
  test_bytes();
  test_mean_field_errors();
  return testing::report("dense_crf");
}
