// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/dense.h"

#include "atrous_conv/dense_gradient.h"
#include "common/check.h"

namespace pydense {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;

const DenseConvFunctions& functions_of(FloatType dtype) {
  const auto& table = select_cpu_table<DenseConvTable>(PYDENSE_CPU_TABLES(kDenseConvTable));
  return PYDENSE_OF_PAIRS(dtype, kDenseConvBFloat16, table.of[static_cast<int>(dtype)]);
}

void check_size(const char* op, const char* name, int64_t height, int64_t width) {
  PYDENSE_CHECK(height >= 1 && width >= 1 && height < kMaxSize && width < kMaxSize, op, ": ", name,
                " must be in [1, ", kMaxSize, "), got (", height, ", ", width, ")");
}

void check_weight(const char* op, const DenseConvShape& shape) {
  PYDENSE_CHECK(shape.channels >= 1 && shape.outputs >= 1, op,
                ": channels and outputs must be at least 1, got ", shape.channels, " and ",
                shape.outputs);
  check_size(op, "kernel size", shape.kernel_height, shape.kernel_width);
}

}  // namespace

void dense_conv_check(const char* op, const DenseConvShape& shape) {
  PYDENSE_CHECK(shape.batches >= 0, op, ": batch must not be negative, got ", shape.batches);
  check_weight(op, shape);
  check_size(op, "size", shape.height, shape.width);
  check_size(op, "output size", shape.out_height, shape.out_width);
  check_size(op, "dilation", shape.dilation_y, shape.dilation_x);
}

void dense_conv(const char* op, FloatType dtype, const DenseConvArgs& args,
                ParallelFor parallel_for) {
  const DenseConvShape& shape = args.shape;
  dense_conv_check(op, shape);
  if (shape.batches == 0) {
    return;
  }
  const std::vector<TapSegment> rows = tap_segments(shape.kernel_height, shape.dilation_y,
                                                    shape.top, shape.height, shape.out_height);
  const std::vector<TapSegment> columns =
      tap_segments(shape.kernel_width, shape.dilation_x, shape.left, shape.width, shape.out_width);
  functions_of(dtype).run(args,
                          {rows.data(), static_cast<int64_t>(rows.size()), columns.data(),
                           static_cast<int64_t>(columns.size())},
                          parallel_for);
}

int64_t dense_conv_packed_bytes(const char* op, FloatType dtype, const DenseConvShape& shape) {
  check_weight(op, shape);
  return functions_of(dtype).packed_bytes(shape);
}

void dense_conv_pack(const char* op, FloatType dtype, const DenseConvShape& shape,
                     const DenseConvWeight& weight, void* packed, ParallelFor parallel_for) {
  check_weight(op, shape);
  functions_of(dtype).pack(shape, weight, packed, parallel_for);
}

int64_t dense_conv_rows_bytes(const char* op, FloatType dtype, const DenseConvShape& shape,
                              const DenseConvPicture& x) {
  dense_conv_check(op, shape);
  return functions_of(dtype).rows_bytes(shape, x);
}

void dense_conv_rows(const char* op, FloatType dtype, const DenseConvShape& shape,
                     const DenseConvPicture& x, void* rows, ParallelFor parallel_for) {
  dense_conv_check(op, shape);
  functions_of(dtype).rows(shape, x, rows, parallel_for);
}

void dense_conv_weight_gradient(const char* op, FloatType dtype, const DenseConvGradientArgs& args,
                                ParallelFor parallel_for) {
  dense_conv_check(op, args.shape);
  const auto& table =
      select_cpu_table<DenseConvGradientTable>(PYDENSE_CPU_TABLES(kDenseConvGradientTable));
  const auto run =
      PYDENSE_OF_PAIRS(dtype, dense_conv_weight_gradient_bf16, table.run[static_cast<int>(dtype)]);
  run(args, parallel_for);
}

}  // namespace pydense
