// SPDX-License-Identifier: Apache-2.0
// Winograd's transforms F(m x m, 3 x 3): a tile of m x m outputs from (m + 2) x (m + 2) inputs by
// as many multiplications, Y = A^T [(G g G^T) * (B^T d B)] A. The matrices are those of polynomials
// that are multiplied through their values at 0, 1, -1, 2, -2 and infinity, as many as are needed.
//
// A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
#pragma once

#include <utility>

#include "common/simd.h"

namespace pydense::PYDENSE_ISA {

template <int Outputs>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int kInput[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};
  static constexpr int kOutput[2][4] = {{1, 1, 1, 0}, {0, 1, -1, -1}};
  static constexpr int kWeight[4][3] = {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 2}};
  static constexpr float kWeightScale[4] = {0.5F, 0.5F, 0.5F, 0.5F};
};

template <>
struct Winograd<3> {
  static constexpr int kInput[5][5] = {
      {2, -1, -2, 1, 0}, {0, -2, -1, 1, 0}, {0, 2, -3, 1, 0}, {0, -1, 0, 1, 0}, {0, 2, -1, -2, 1}};
  static constexpr int kOutput[3][5] = {{1, 1, 1, 1, 0}, {0, 1, -1, 2, 0}, {0, 1, 1, 4, 1}};
  static constexpr int kWeight[5][3] = {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {1, 2, 4}, {0, 0, 1}};
  static constexpr float kWeightScale[5] = {0.5F, -0.5F, -1.0F / 6, 1.0F / 6, 1.0F};
};

template <>
struct Winograd<4> {
  static constexpr int kInput[6][6] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0},
                                       {0, 4, -4, -1, 1, 0}, {0, -2, -1, 2, 1, 0},
                                       {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
  static constexpr int kOutput[4][6] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
  static constexpr int kWeight[6][3] = {{1, 0, 0}, {1, 1, 1},  {1, -1, 1},
                                        {1, 2, 4}, {1, -2, 4}, {0, 0, 1}};
  static constexpr float kWeightScale[6] = {0.25F,     -1.0F / 6, -1.0F / 6,
                                            1.0F / 24, 1.0F / 24, 1.0F};
};

// fn(IntConstant) for 0 to Count - 1.
template <int Count, class Fn>
PYDENSE_HD void unrolled(const Fn& fn) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (fn(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, Count>{});
}

// The sum of numbers that lie `stride` apart, by a row of a matrix. Numbers whose factor is 0
// are not read.
template <int... Factor, class V>
PYDENSE_HD V combined(const V* from, int64_t stride) {
  V sum{};
  bool first = true;
  int64_t k = 0;
  const auto add = [&]<int F>(std::integral_constant<int, F>) {
    if constexpr (F != 0) {
      const V own = from[k * stride];
      if (first) {
        sum = F == 1 ? own : own * static_cast<float>(F);
      } else if constexpr (F == 1) {
        sum = sum + own;
      } else if constexpr (F == -1) {
        sum = sum - own;
      } else {
        sum = fma(own, broadcast<V>(static_cast<float>(F)), sum);
      }
      first = false;
    }
    ++k;
  };
  (add(std::integral_constant<int, Factor>{}), ...);
  return sum;
}

// to = M from M^T, for M of Rows x Columns as Matrix::get<i, k>() gives it.
template <class Matrix, class V>
PYDENSE_HD void transform(const V* from, V* to) {
  constexpr int kRows = Matrix::kRows;
  constexpr int kColumns = Matrix::kColumns;
  const auto line = []<int Row>(std::integral_constant<int, Row>, const V* v, int64_t stride) {
    return [&]<int... K>(std::integer_sequence<int, K...>) {
      return combined<Matrix::at(Row, K)...>(v, stride);
    }(std::make_integer_sequence<int, kColumns>{});
  };
  V half[kRows * kColumns];
  unrolled<kRows>([&](auto i) {
    unrolled<kColumns>(
        [&](auto j) { half[int{i} * kColumns + int{j}] = line(i, from + int{j}, kColumns); });
  });
  unrolled<kRows>([&](auto i) {
    unrolled<kRows>(
        [&](auto j) { to[int{i} * kRows + int{j}] = line(j, half + int{i} * kColumns, 1); });
  });
}

template <int M>
struct WinogradInput {
  static constexpr int kRows = M + 2;
  static constexpr int kColumns = M + 2;
  static constexpr int at(int i, int k) { return Winograd<M>::kInput[i][k]; }
};
template <int M>
struct WinogradOutput {
  static constexpr int kRows = M;
  static constexpr int kColumns = M + 2;
  static constexpr int at(int i, int k) { return Winograd<M>::kOutput[i][k]; }
};
template <int M>
struct WinogradWeight {
  static constexpr int kRows = M + 2;
  static constexpr int kColumns = 3;
  static constexpr int at(int i, int k) { return Winograd<M>::kWeight[i][k]; }
};

// [3 x 3] to [(M + 2) x (M + 2)]. The factors of G are whole numbers times one of each row.
template <int M, class V>
PYDENSE_HD void transform_weight(const V* from, V* to) {
  transform<WinogradWeight<M>>(from, to);
  unrolled<M + 2>([&](auto i) {
    unrolled<M + 2>([&](auto j) {
      constexpr float kScale = Winograd<M>::kWeightScale[i] * Winograd<M>::kWeightScale[j];
      to[int{i} * (M + 2) + int{j}] *= broadcast<V>(kScale);
    });
  });
}

}  // namespace pydense::PYDENSE_ISA
