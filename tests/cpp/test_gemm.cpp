// SPDX-License-Identifier: Apache-2.0
// Products by the micro-kernels against sums in double: every remainder of rows and columns, depths
// odd and even, both ways to pack, and what is said of rounding, NaN, infinity and subnormal
// numbers, on every instruction set.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "common/half.h"
#include "gemm_product.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class S>
constexpr int kType = std::is_same_v<S, double>     ? 1
                      : std::is_same_v<S, float>    ? 0
                      : std::is_same_v<S, BFloat16> ? 2
                                                    : 3;

const GemmProductTable& table() {
#if defined(PYDENSE_X86_KERNELS)
  return select_cpu_table<GemmProductTable>(
      {{CpuIsa::kBaseline, &baseline::kGemmProductTable},
       {CpuIsa::kAvx2, &avx2::kGemmProductTable},
       {CpuIsa::kAvx512, &avx512::kGemmProductTable},
       {CpuIsa::kAvx512Bf16, &avx512_bf16::kGemmProductTable}});
#else
  return select_cpu_table<GemmProductTable>(PYDENSE_CPU_TABLES(kGemmProductTable));
#endif
}

template <class S>
struct Matrix {
  Matrix(int64_t rows, int64_t columns)
      : width(columns), numbers(static_cast<size_t>(rows * columns)) {}

  S& at(int64_t i, int64_t j) { return numbers[static_cast<size_t>(i * width + j)]; }
  double read(int64_t i, int64_t j) const {
    return static_cast<double>(
        portable::load_as<ComputeOf<S>>(&numbers[static_cast<size_t>(i * width + j)]));
  }
  void write(int64_t i, int64_t j, double value) {
    portable::store_as(&at(i, j), static_cast<ComputeOf<S>>(value));
  }

  int64_t width;
  std::vector<S> numbers;
};

template <class S>
Matrix<S> random_matrix(int64_t rows, int64_t columns, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Matrix<S> result(rows, columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      result.write(i, j, normal(random));
    }
  }
  return result;
}

template <class S>
using Sums = Matrix<ComputeOf<S>>;

template <class S>
bool same_bits(const Sums<S>& a, const Sums<S>& b) {
  return std::memcmp(a.numbers.data(), b.numbers.data(), a.numbers.size() * sizeof(ComputeOf<S>)) ==
         0;
}

template <class S>
void multiply(const Matrix<S>& a, const Matrix<S>& b, Sums<S>& c, bool packed, bool more) {
  const auto rows = static_cast<int64_t>(c.numbers.size()) / c.width;
  table().run[kType<S>](
      {rows, c.width, a.width, a.numbers.data(), b.numbers.data(), c.numbers.data(), packed, more});
}

template <class S>
void check(int64_t rows, int64_t columns, int64_t depth) {
  const Matrix<S> a = random_matrix<S>(rows, depth, 1);
  const Matrix<S> b = random_matrix<S>(depth, columns, 2);
  Sums<S> c(rows, columns);
  multiply(a, b, c, true, false);
  const double rounding = 0.5 * std::numeric_limits<ComputeOf<S>>::epsilon();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      long double exact = 0;
      double size = 0;
      for (int64_t k = 0; k < depth; ++k) {
        exact += static_cast<long double>(a.read(i, k)) * b.read(k, j);
        size += std::fabs(a.read(i, k) * b.read(k, j));
      }
      // Baseline rounds products and sums, all others sums alone.
      const double bound = rounding * size * static_cast<double>(depth + 2);
      EXPECT(std::fabs(static_cast<double>(c.read(i, j) - exact)) <= bound);
    }
  }
  // Where rows lie and how columns were packed does not show.
  Sums<S> gathered(rows, columns);
  multiply(a, b, gathered, false, false);
  EXPECT(same_bits<S>(c, gathered));
  // Nor does a depth in two parts, cut between pairs.
  const int64_t cut = depth / 4 * 2;
  Matrix<S> left[2] = {{rows, cut}, {rows, depth - cut}};
  Matrix<S> right[2] = {{cut, columns}, {depth - cut, columns}};
  for (int64_t k = 0; k < depth; ++k) {
    const int part = k < cut ? 0 : 1;
    const int64_t at = k - part * cut;
    for (int64_t i = 0; i < rows; ++i) {
      left[part].write(i, at, a.read(i, k));
    }
    for (int64_t j = 0; j < columns; ++j) {
      right[part].write(at, j, b.read(k, j));
    }
  }
  Sums<S> parts(rows, columns);
  for (int part = 0; part < 2; ++part) {
    multiply(left[part], right[part], parts, part == 0, part == 1);
  }
  EXPECT(same_bits<S>(c, parts));
}

// A number that is not finite reaches its row or column, and nothing else.
template <class S>
void check_special(double special, bool left) {
  constexpr int64_t kRows = 14;
  constexpr int64_t kColumns = 35;
  for (int64_t depth = 1; depth <= 5; ++depth) {
    for (int64_t k = 0; k < depth; ++k) {
      Matrix<S> a = random_matrix<S>(kRows, depth, 3);
      Matrix<S> b = random_matrix<S>(depth, kColumns, 4);
      (left ? a : b).write(left ? 13 : k, left ? k : 33, special);
      Sums<S> c(kRows, kColumns);
      multiply(a, b, c, k % 2 == 0, false);
      for (int64_t i = 0; i < kRows; ++i) {
        for (int64_t j = 0; j < kColumns; ++j) {
          const bool meets = left ? i == 13 : j == 33;
          const double got = c.read(i, j);
          if (!meets) {
            EXPECT(std::isfinite(got));
          } else {
            const double wanted = special * (left ? b.read(k, j) : a.read(i, k));
            EXPECT(std::isnan(special) ? std::isnan(got) : got == wanted);
          }
        }
      }
    }
  }
}

// Powers of 2 whose product is a normal float, one of them subnormal in bfloat16, and a product
// that is subnormal itself: 0 where pairs are multiplied, exact elsewhere.
void check_subnormal() {
  const auto product = [](int x, int y) {
    Matrix<BFloat16> a(1, 1);
    Matrix<BFloat16> b(1, 1);
    a.write(0, 0, std::ldexp(1.0, x));
    b.write(0, 0, std::ldexp(1.0, y));
    EXPECT(a.read(0, 0) > 0 && b.read(0, 0) > 0);
    Sums<BFloat16> c(1, 1);
    multiply(a, b, c, true, false);
    return c.read(0, 0);
  };
  const bool pairs = table().pairs;
  EXPECT(product(-130, 20) == (pairs ? 0 : std::ldexp(1.0, -110)));
  EXPECT(product(-70, -60) == (pairs ? 0 : std::ldexp(1.0, -130)));
  EXPECT(product(-70, -50) == std::ldexp(1.0, -120));
}

template <class S>
void check_all() {
  for (int64_t depth = 1; depth <= 70; ++depth) {
    check<S>(13, 33, depth);
  }
  for (int64_t rows = 1; rows <= 25; ++rows) {
    check<S>(rows, 17, 7);
  }
  for (int64_t columns = 1; columns <= 70; ++columns) {
    check<S>(3, columns, 6);
  }
  check<S>(30, 100, 301);
  for (const double special : {kNan, kInfinity, -kInfinity}) {
    check_special<S>(special, true);
    check_special<S>(special, false);
  }
}

}  // namespace

int main() {
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(cpu_isa_name(isa));
    EXPECT(table().pairs == (isa >= CpuIsa::kAvx512Bf16));
    check_all<float>();
    check_all<double>();
    check_all<BFloat16>();
    check_all<Half>();
    check_subnormal();
  }
  return testing::report("gemm");
}
