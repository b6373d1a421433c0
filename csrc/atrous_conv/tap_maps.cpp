// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/tap_maps.h"

#include "common/check.h"

namespace pydense {
namespace {

const TapMapsTable& table() {
  return select_cpu_table<TapMapsTable>(PYDENSE_CPU_TABLES(kTapMapsTable));
}

void check_maps(const char* op, const TapMaps& shape) {
  PYDENSE_CHECK(shape.outputs >= 0 && shape.height >= 0 && shape.width >= 0, op,
                ": sizes must not be negative, got ", shape.outputs, ", ", shape.height, " and ",
                shape.width);
}

}  // namespace

void tap_sum(const char* op, FloatType dtype, const TapSumArgs& args, ParallelFor parallel_for) {
  check_maps(op, args.shape);
  if (args.shape.outputs * args.shape.height * args.shape.width > 0) {
    table().sum[static_cast<int>(dtype)](args, parallel_for);
  }
}

void tap_spread(const char* op, FloatType dtype, const TapSpreadArgs& args,
                ParallelFor parallel_for) {
  check_maps(op, args.shape);
  PYDENSE_CHECK(args.first >= 0 && args.count >= 0 && args.first <= args.shape.height - args.count,
                op, ": rows must lie in [0, ", args.shape.height, "), got ", args.count, " from ",
                args.first);
  if (args.shape.taps * args.shape.outputs * args.count * args.shape.width > 0) {
    table().spread[static_cast<int>(dtype)](args, parallel_for);
  }
}

}  // namespace pydense
