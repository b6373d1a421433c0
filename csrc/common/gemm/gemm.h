// SPDX-License-Identifier: Apache-2.0
// Packed matrix products for kernels that make their operands themselves: C = A B by blocks of
// kGemmRows x kGemmColumns, C in float or double. P, what operands are packed as, is float, double
// or BFloat16 (GemmOperandOf).
//
// B is packed in panels of kGemmColumns columns, [step][column][number of the step]; A in panels of
// kGemmRows rows, [step][row][number of the step], or read where it lies. Who gathers operands
// writes panels himself. A panel of A stays in the first-level cache while all of B, from the
// second level, passes by. Every number of C is one chain of multiply-adds along the depth: the
// same bits for every blocking, and for float and double on all instruction sets that have fma.
#pragma once

#include "common/gemm/gemm_bf16.h"
#include "common/partial.h"
#include "common/with_constant.h"

namespace pydense::PYDENSE_ISA {

// As many sums as the registers hold beside two vectors of B and one of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGemmRows = 12;
#else
constexpr int kGemmRows = 6;
#endif
template <class P>
constexpr int kGemmColumns = 2 * kNativeLanesOf<ComputeOf<P>>;

constexpr int64_t gemm_panels(int64_t size, int64_t panel) { return (size + panel - 1) / panel; }

// Lines of memory that are asked for while a block is at work, one at a step of its depth: it
// leaves the way to memory idle, and many at once would be in the way of its own.
class GemmAhead {
 public:
  static constexpr int kMaxLines = 256;

  PYDENSE_HD void add(const void* line) {
    if (count_ < kMaxLines) {
      lines_[count_++] = line;
    }
  }
  // The lines of `bytes` bytes.
  PYDENSE_HD void add(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLine) {
      add(static_cast<const char*>(from) + i);
    }
  }
  PYDENSE_HD void clear() { count_ = 0; }
  PYDENSE_HD int64_t count() const { return count_; }
  // Into the second-level cache.
  PYDENSE_HD void ask(int64_t i) const { __builtin_prefetch(lines_[i], 0, 2); }

 private:
  static constexpr int64_t kLine = 64;
  int64_t count_ = 0;
  const void* lines_[kMaxLines];
};

// One block: c[i][j] = sum over k of a(i, k) b(k, j), Rows x kGemmColumns, rows c_row apart.
// `more`: added to what c holds. `depth` is in numbers, whole steps of them. Packed: a is a panel
// of Rows rows, else a(i, k) is a[i * a_row + k].
template <class P, int Rows, bool Packed>
[[gnu::noinline]] void gemm_block(int64_t depth, const P* a, int64_t a_row, const P* b,
                                  ComputeOf<P>* c, int64_t c_row, bool more,
                                  const GemmAhead* ahead) {
  using T = ComputeOf<P>;
  constexpr int kLanes = kNativeLanesOf<T>;
  constexpr int kStep = kGemmStep<P>;
  using V = Vec<T, kLanes>;
  using Steps = Vec<GemmLane<P>, kLanes>;
  V sum[Rows][2] = {};
  if (more) {
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      sum[i][0] = load<V>(c + i * c_row);
      sum[i][1] = load<V>(c + i * c_row + kLanes);
    }
  }
  const auto step = [&](int64_t k) {
    const auto b0 = load<Steps>(b + k * 2 * kLanes * kStep);
    const auto b1 = load<Steps>(b + (k * 2 + 1) * kLanes * kStep);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const P* const from = a + (Packed ? k * Rows + i : k) * kStep + (Packed ? 0 : i * a_row);
      const Steps own = broadcast<Steps>(load<GemmLane<P>>(from));
      sum[i][0] = gemm_add<P>(own, b0, sum[i][0]);
      sum[i][1] = gemm_add<P>(own, b1, sum[i][1]);
    }
  };
  const int64_t steps = depth / kStep;
  int64_t k = 0;
  for (const int64_t asked = ahead == nullptr ? 0 : smaller(steps, ahead->count()); k < asked;
       ++k) {
    ahead->ask(k);
    step(k);
  }
  for (; k < steps; ++k) {
    step(k);
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    store(c + i * c_row, sum[i][0]);
    store(c + i * c_row + kLanes, sum[i][1]);
  }
}

// The same for up to kGemmRows rows.
template <class P, bool Packed>
PYDENSE_HD void gemm_rows(int64_t rows, int64_t depth, const P* a, int64_t a_row, const P* b,
                          ComputeOf<P>* c, int64_t c_row, bool more = false,
                          const GemmAhead* ahead = nullptr) {
  with_constant<kGemmRows>(rows, [&](auto count) {
    gemm_block<P, decltype(count)::value, Packed>(depth, a, a_row, b, c, c_row, more, ahead);
  });
}

// A number as it is packed.
template <class P, class S>
PYDENSE_HD P gemm_operand(const S* from) {
  if constexpr (std::is_same_v<P, S>) {
    return *from;
  } else {
    return load_as<P>(from);
  }
}

// Panels of A from a[i * row + k * column], gemm_depth deep. The last panel has as many rows as are
// left.
template <class P, class S>
void gemm_pack_rows(const S* a, int64_t row, int64_t column, int64_t rows, int64_t depth, P* to) {
  for (int64_t first = 0; first < rows; first += kGemmRows) {
    const int64_t count = smaller(kGemmRows, rows - first);
    for (int64_t step = 0; step < depth; step += kGemmStep<P>) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t k = step; k < step + kGemmStep<P>; ++k) {
          *to++ = k < depth ? gemm_operand<P>(a + (first + i) * row + k * column) : P{};
        }
      }
    }
  }
}

// Panels of B from b[k * row + j * column], gemm_depth deep, zeros behind the last column.
template <class P, class S>
void gemm_pack_columns(const S* b, int64_t row, int64_t column, int64_t columns, int64_t depth,
                       P* to) {
  for (int64_t first = 0; first < columns; first += kGemmColumns<P>) {
    const int64_t count = smaller(kGemmColumns<P>, columns - first);
    for (int64_t step = 0; step < depth; step += kGemmStep<P>) {
      for (int64_t j = 0; j < kGemmColumns<P>; ++j) {
        for (int64_t k = step; k < step + kGemmStep<P>; ++k) {
          *to++ =
              j < count && k < depth ? gemm_operand<P>(b + k * row + (first + j) * column) : P{};
        }
      }
    }
  }
}

}  // namespace pydense::PYDENSE_ISA
