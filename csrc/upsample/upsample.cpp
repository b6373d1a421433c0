// SPDX-License-Identifier: Apache-2.0
#include "upsample/upsample.h"

#include "common/check.h"

namespace pydense {
namespace {

constexpr int64_t kMaxAxis = AxisTable<float>::kMaxSize;
constexpr double kMaxOffset = 1e12;  // beyond it, coordinates would not be exact

void check_axis(const char* op, const char* name, const AxisSpec& axis, int64_t out_size) {
  PYDENSE_CHECK(axis.in_size >= 1 && axis.in_size <= kMaxAxis, op, ": ", name,
                " of the input must be in [1, ", kMaxAxis, "], got ", axis.in_size);
  PYDENSE_CHECK(axis.out_size == out_size, op, ": ", name, " must be ", out_size, ", got ",
                axis.out_size);
  if (axis.grid == AxisGrid::kCrop) {
    PYDENSE_CHECK(axis.stride >= 1 && axis.stride <= kMaxAxis, op, ": stride must be in [1, ",
                  kMaxAxis, "], got ", axis.stride);
    PYDENSE_CHECK(axis.offset >= -kMaxOffset && axis.offset <= kMaxOffset, op,
                  ": offset must be within ", kMaxOffset, ", got ", axis.offset);
  }
}

const UpsampleTable& table() {
  return select_cpu_table<UpsampleTable>(PYDENSE_CPU_TABLES(kUpsampleTable));
}

}  // namespace

void check_upsample_size(const char* op, int64_t height, int64_t width) {
  PYDENSE_CHECK(height >= 1 && height <= kMaxAxis && width >= 1 && width <= kMaxAxis, op,
                ": size must be in [1, ", kMaxAxis, "], got (", height, ", ", width, ")");
}

void check_upsample(const char* op, const UpsampleShape& shape, const UpsampleInput* inputs,
                    int num_inputs) {
  PYDENSE_CHECK(shape.batches >= 0 && shape.channels >= 0, op,
                ": batch and channels must not be negative, got ", shape.batches, " and ",
                shape.channels);
  check_upsample_size(op, shape.height, shape.width);
  PYDENSE_CHECK(num_inputs >= 1 && num_inputs <= kMaxUpsampleInputs, op, ": inputs must be 1 to ",
                kMaxUpsampleInputs, ", got ", num_inputs);
  for (int k = 0; k < num_inputs; ++k) {
    if (!inputs[k].same_size) {
      check_axis(op, "height", inputs[k].y, shape.height);
      check_axis(op, "width", inputs[k].x, shape.width);
    }
  }
}

void upsample_forward(const char* op, FloatType dtype, const UpsampleArgs& args,
                      ParallelFor parallel_for) {
  check_upsample(op, args.shape, args.inputs, args.num_inputs);
  if (args.shape.batches > 0 && args.shape.channels > 0) {
    table().forward[static_cast<int>(dtype)](args, parallel_for);
  }
}

void upsample_backward(const char* op, FloatType dtype, const UpsampleBackwardArgs& args,
                       ParallelFor parallel_for) {
  check_upsample(op, args.shape, args.inputs, args.num_inputs);
  if (args.shape.batches > 0 && args.shape.channels > 0) {
    table().backward[static_cast<int>(dtype)](args, parallel_for);
  }
}

}  // namespace pydense
