// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/depthwise.h"

#include <algorithm>

#include "atrous_conv/depthwise_plan.h"
#include "common/check.h"

namespace pydense {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;

void check_shape(const char* op, const DepthwiseShape& shape) {
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

// Outputs that tap i reads a pixel for are [begin, end), those of the next tap begin and end no
// later: between any two such places, the taps are a range.
std::vector<DepthwiseSegment> segments_of(int64_t taps, int64_t dilation, int64_t padding,
                                          int64_t size, int64_t out_size) {
  std::vector<int64_t> cuts = {0, out_size};
  for (int64_t i = 0; i < taps; ++i) {
    const int64_t begin = padding - i * dilation;
    cuts.push_back(std::clamp<int64_t>(begin, 0, out_size));
    cuts.push_back(std::clamp<int64_t>(begin + size, 0, out_size));
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<DepthwiseSegment> segments;
  for (size_t k = 0; k + 1 < cuts.size(); ++k) {
    DepthwiseSegment segment = {cuts[k], cuts[k + 1], taps, 0};
    for (int64_t i = 0; i < taps; ++i) {
      const int64_t read = segment.begin + i * dilation - padding;
      if (read >= 0 && read < size) {
        segment.first = std::min(segment.first, i);
        segment.last = i + 1;
      }
    }
    segment.first = std::min(segment.first, segment.last);
    segments.push_back(segment);
  }
  return segments;
}

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

DepthwisePlanMemory::DepthwisePlanMemory(const char* op, const DepthwiseShape& shape) {
  check_shape(op, shape);
  segments_ =
      segments_of(shape.kernel_width, shape.dilation_x, shape.left, shape.width, shape.out_width);
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
