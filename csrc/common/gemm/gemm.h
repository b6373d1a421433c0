// SPDX-License-Identifier: Apache-2.0
// Packed matrix products for kernels that make their operands themselves: C = A B by blocks of
// kGemmRows x kGemmColumns, in float32 (16-bit operands are widened when they are packed) or
// float64.
//
// B is packed in panels of kGemmColumns columns, [depth][column]; A in panels of kGemmRows rows,
// [depth][row], or read where it lies. A panel of A stays in the first-level cache while all of B,
// from the second level, passes by. Every number of C is one chain of fused multiply-adds along
// the depth: the same bits for every blocking, and on all instruction sets that have fma.
#pragma once

#include "common/partial.h"
#include "common/with_constant.h"

namespace pydense::PYDENSE_ISA {

// As many sums as the registers hold beside two vectors of B and one of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGemmRows = 12;
#else
constexpr int kGemmRows = 6;
#endif
template <class T>
constexpr int kGemmColumns = 2 * kNativeLanesOf<T>;

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

// One block: c[i][j] = sum over k of a(i, k) b[k][j], Rows x kGemmColumns, rows c_row apart.
// `more`: added to what c holds. Packed: a(i, k) is a[k * Rows + i], else a[i * a_row + k].
template <class T, int Rows, bool Packed>
[[gnu::noinline]] void gemm_block(int64_t depth, const T* a, int64_t a_row, const T* b, T* c,
                                  int64_t c_row, bool more, const GemmAhead* ahead) {
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  V sum[Rows][2] = {};
  if (more) {
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      sum[i][0] = load<V>(c + i * c_row);
      sum[i][1] = load<V>(c + i * c_row + kLanes);
    }
  }
  const auto step = [&](int64_t k) {
    const V b0 = load<V>(b + k * 2 * kLanes);
    const V b1 = load<V>(b + k * 2 * kLanes + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const V own = broadcast<V>(Packed ? a[k * Rows + i] : a[i * a_row + k]);
      sum[i][0] = fma(own, b0, sum[i][0]);
      sum[i][1] = fma(own, b1, sum[i][1]);
    }
  };
  int64_t k = 0;
  for (const int64_t asked = ahead == nullptr ? 0 : smaller(depth, ahead->count()); k < asked;
       ++k) {
    ahead->ask(k);
    step(k);
  }
  for (; k < depth; ++k) {
    step(k);
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    store(c + i * c_row, sum[i][0]);
    store(c + i * c_row + kLanes, sum[i][1]);
  }
}

// The same for up to kGemmRows rows.
template <class T, bool Packed>
PYDENSE_HD void gemm_rows(int64_t rows, int64_t depth, const T* a, int64_t a_row, const T* b, T* c,
                          int64_t c_row, bool more = false, const GemmAhead* ahead = nullptr) {
  with_constant<kGemmRows>(rows, [&](auto count) {
    gemm_block<T, decltype(count)::value, Packed>(depth, a, a_row, b, c, c_row, more, ahead);
  });
}

// Panels of A from a[i * row + k * column]. The last panel has as many rows as are left.
template <class T, class S>
void gemm_pack_rows(const S* a, int64_t row, int64_t column, int64_t rows, int64_t depth, T* to) {
  for (int64_t first = 0; first < rows; first += kGemmRows) {
    const int64_t count = smaller(kGemmRows, rows - first);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < count; ++i) {
        *to++ = load_as<T>(a + (first + i) * row + k * column);
      }
    }
  }
}

// Panels of B from b[k * row + j * column], zeros behind the last column.
template <class T, class S>
void gemm_pack_columns(const S* b, int64_t row, int64_t column, int64_t columns, int64_t depth,
                       T* to) {
  for (int64_t first = 0; first < columns; first += kGemmColumns<T>) {
    const int64_t count = smaller(kGemmColumns<T>, columns - first);
    for (int64_t k = 0; k < depth; ++k, to += kGemmColumns<T>) {
      for (int64_t j = 0; j < kGemmColumns<T>; ++j) {
        to[j] = j < count ? load_as<T>(b + k * row + (first + j) * column) : T{};
      }
    }
  }
}

}  // namespace pydense::PYDENSE_ISA
