// SPDX-License-Identifier: Apache-2.0
// The outputs of a picture as runs, the rows of blocks of the product. All pixels of a run read the
// same taps, and lie side by side or below each other.
#pragma once

#include "atrous_conv/dense.h"
#include "common/buffer.h"
#include "common/gemm/gemm.h"

namespace pydense::PYDENSE_ISA {

struct DenseRun {
  int32_t y;
  int32_t x;
  int32_t row;     // segment of the rows
  int32_t column;  // and of the columns
  int16_t count;
  int16_t vertical;
};

class DenseRuns {
 public:
  explicit DenseRuns(const DenseConvPlan& plan) : plan_(plan) {
    int64_t runs = 0;
    each([&](const DenseRun&) { ++runs; });
    memory_ = buffer_of<DenseRun>(static_cast<size_t>(runs));
    each([&](const DenseRun& run) { memory_.as<DenseRun>()[size_++] = run; });
  }

  int64_t size() const { return size_; }
  const DenseRun& operator[](int64_t i) const { return memory_.as<DenseRun>()[i]; }

  const TapSegment& rows(const DenseRun& run) const { return plan_.rows[run.row]; }
  const TapSegment& columns(const DenseRun& run) const { return plan_.columns[run.column]; }
  int64_t taps(const DenseRun& run) const {
    return (rows(run).last - rows(run).first) * (columns(run).last - columns(run).first);
  }
  bool reads(const DenseRun& run, int64_t i, int64_t j) const {
    return i >= rows(run).first && i < rows(run).last && j >= columns(run).first &&
           j < columns(run).last;
  }

 private:
  // Steps of the product that `lines` of this length cost: one of few rows is bound by its loads.
  static int64_t cost(int64_t lines, int64_t length) {
    constexpr int64_t kLeastRows = 4;
    const int64_t blocks = ceil_div(length, kGemmRows);
    return lines * larger(length, blocks * kLeastRows);
  }
  static int64_t length(const TapSegment& segment) { return segment.end - segment.begin; }
  static bool is_vertical(const TapSegment& row, const TapSegment& column) {
    return cost(length(column), length(row)) < cost(length(row), length(column));
  }
  // [begin, end) in parts of up to kGemmRows, of sizes that differ by at most one.
  template <class Fn>
  static void split(const TapSegment& segment, const Fn& fn) {
    const int64_t parts = ceil_div(length(segment), kGemmRows);
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t begin = segment.begin + p * length(segment) / parts;
      fn(static_cast<int32_t>(begin),
         static_cast<int16_t>(segment.begin + (p + 1) * length(segment) / parts - begin));
    }
  }

  template <class Fn>
  void each(const Fn& fn) const {
    for (int32_t r = 0; r < plan_.num_rows; ++r) {
      const TapSegment& row = plan_.rows[r];
      for (auto y = static_cast<int32_t>(row.begin); y < row.end; ++y) {
        for (int32_t c = 0; c < plan_.num_columns; ++c) {
          if (!is_vertical(row, plan_.columns[c])) {
            split(plan_.columns[c],
                  [&](int32_t x, int16_t count) { fn(DenseRun{y, x, r, c, count, 0}); });
          }
        }
      }
      for (int32_t c = 0; c < plan_.num_columns; ++c) {
        if (is_vertical(row, plan_.columns[c])) {
          split(row, [&](int32_t y, int16_t count) {
            for (auto x = static_cast<int32_t>(plan_.columns[c].begin); x < plan_.columns[c].end;
                 ++x) {
              fn(DenseRun{y, x, r, c, count, 1});
            }
          });
        }
      }
    }
  }

  DenseConvPlan plan_;
  Buffer memory_;
  int64_t size_ = 0;
};

}  // namespace pydense::PYDENSE_ISA
