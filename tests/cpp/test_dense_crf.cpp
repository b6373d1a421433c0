// SPDX-License-Identifier: Apache-2.0
// The lattice against a plain double-precision one on std::map, and against itself over threads,
// instruction sets, orders of points and its form as bytes.
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
#include "dense_crf/permutohedral.h"
#include "lattices.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::build;
using testing::filter;
using testing::Lattice;
using testing::random_floats;
using testing::thread_for;

namespace {

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

// Each vertex with neighbours is in one chain of an axis; short chains come first, by length.
void test_chains() {
  const auto features = random_floats(size_t{6000} * 3, 6, 7);
  const Lattice lattice = build(features, 3, thread_for);
  const LatticeView<float>& view = lattice.view;
  for (int axis = 0; axis <= view.dims; ++axis) {
    const int64_t end = view.chain_starts[axis + 1];
    std::vector<int32_t> rows;
    int64_t before = 2;
    for (int64_t first = view.chain_starts[axis]; first < end;) {
      int64_t last = first;
      while (last + 1 < end && view.chains[last] >= 0) {
        ++last;
      }
      EXPECT(view.chains[last] < 0);
      const int64_t length = std::min<int64_t>(last + 1 - first, kLongChain);
      EXPECT(length >= before);
      before = length;
      for (int64_t i = first; i <= last; ++i) {
        rows.push_back(i < last ? view.chains[i] : ~view.chains[i]);
      }
      first = last + 1;
    }
    EXPECT(before == kLongChain);
    std::sort(rows.begin(), rows.end());
    EXPECT(std::adjacent_find(rows.begin(), rows.end()) == rows.end());
    EXPECT(rows.front() >= 0 && rows.back() < view.num_rows);
  }
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
  // Magic and size have to be right, counts possible.
  const auto altered = [&](size_t at, unsigned bit) {
    both.as<uint8_t>()[size + at + bit / 8] ^= static_cast<uint8_t>(1U << bit % 8);
    EXPECT_THROWS(count_lattices<float>("test", both.data(), 2 * size), "other bytes");
    both.as<uint8_t>()[size + at + bit / 8] ^= static_cast<uint8_t>(1U << bit % 8);
  };
  altered(0, 0);
  altered(8, 6);
  for (size_t at = 24; at <= 80; at += 8) {
    altered(at, 40);
    altered(at, 63);
  }
  both.as<char>()[size] ^= 1;
  EXPECT_THROWS(count_lattices<float>("test", both.data(), 2 * size), "other bytes");
}

}  // namespace

int main() {
  test_against_plain_lattice();
  test_same_bits_everywhere();
  test_chains();
  test_transpose();
  test_lattice_errors();
  test_bands();
  test_pictures();
  test_self_term();
  test_bytes();
  return testing::report("dense_crf");
}
