// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/depthwise.h"

#include <algorithm>

#include "atrous_conv/depthwise_plan.h"
#include "common/check.h"

namespace pydense {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;

// 0, d, 2 d, ..., 1, d + 1, ...
std::vector<int64_t> rows_by_phase(int64_t height, int64_t dilation) {
  std::vector<int64_t> rows;
  rows.reserve(static_cast<size_t>(height));
  for (int64_t phase = 0; phase < std::min(height, dilation); ++phase) {
    for (int64_t y = phase; y < height; y += dilation) {
      rows.push_back(y);
    }
  }
  return rows;
}

template <class Run>
void with_plan(const char* op, const DepthwiseShape& shape, const Run& run) {
  const DepthwisePlanMemory memory(op, shape);
  if (shape.channels > 0) {
    run(memory.plan());
  }
}

}  // namespace

void check_depthwise_shape(const char* op, const DepthwiseShape& shape) {
  PYDENSE_CHECK(shape.batches >= 0 && shape.channels >= 0, op,
                ": batch and channels must not be negative, got ", shape.batches, " and ",
                shape.channels);
  const auto check_size = [&](const char* name, int64_t height, int64_t width) {
    PYDENSE_CHECK(height >= 1 && width >= 1 && height < kMaxSize && width < kMaxSize, op, ": ",
                  name, " must be in [1, ", kMaxSize, "), got (", height, ", ", width, ")");
  };
  check_size("size", shape.height, shape.width);
  check_size("output size", shape.out_height, shape.out_width);
  check_size("kernel size", shape.kernel_height, shape.kernel_width);
  check_size("dilation", shape.dilation_y, shape.dilation_x);
}

DepthwisePlanMemory::DepthwisePlanMemory(const char* op, const DepthwiseShape& shape) {
  check_depthwise_shape(op, shape);
  segments_ =
      tap_segments(shape.kernel_width, shape.dilation_x, shape.left, shape.width, shape.out_width);
  rows_ = rows_by_phase(shape.out_height, shape.dilation_y);
}

void depthwise(const char* op, FloatType dtype, const DepthwiseArgs& args,
               ParallelFor parallel_for) {
  with_plan(op, args.shape, [&](const DepthwisePlan& plan) {
    if (args.shape.batches > 0) {
      select_cpu_table<DepthwiseTable>(PYDENSE_CPU_TABLES(kDepthwiseTable))
          .forward[static_cast<int>(dtype)](args, plan, parallel_for);
    }
  });
}

void depthwise_weight_gradient(const char* op, FloatType dtype, const DepthwiseGradientArgs& args,
                               ParallelFor parallel_for) {
  with_plan(op, args.shape, [&](const DepthwisePlan& plan) {
    select_cpu_table<DepthwiseGradientTable>(PYDENSE_CPU_TABLES(kDepthwiseGradientTable))
        .run[static_cast<int>(dtype)](args, plan, parallel_for);
  });
}

}  // namespace pydense
