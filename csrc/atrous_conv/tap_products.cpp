// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/tap_products.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/check.h"

namespace pydense {
namespace {

const TapProductFunctions& functions_of(FloatType dtype) {
  const auto& table = select_cpu_table<TapProductsTable>(PYDENSE_CPU_TABLES(kTapProductsTable));
  return PYDENSE_OF_PAIRS(dtype, kTapProductsBf16, table.of[static_cast<int>(dtype)]);
}

void check_shape(const char* op, const TapProductShape& shape) {
  PYDENSE_CHECK(shape.taps.outputs >= 0 && shape.taps.height >= 0 && shape.taps.width >= 0 &&
                    shape.images >= 0 && shape.channels >= 0,
                op, ": sizes must not be negative, got ", shape.images, ", ", shape.channels, ", ",
                shape.taps.outputs, ", ", shape.taps.height, " and ", shape.taps.width);
}

int64_t pixels_of(const TapProductShape& shape) { return shape.taps.height * shape.taps.width; }

int64_t size_of(FloatType dtype) {
  return dtype == FloatType::kFloat64 ? 8 : dtype == FloatType::kFloat32 ? 4 : 2;
}

}  // namespace

void tap_products(const char* op, FloatType dtype, const TapProductArgs& args,
                  ParallelFor parallel_for) {
  const TapProductShape& shape = args.shape;
  check_shape(op, shape);
  if (shape.images * shape.taps.outputs * pixels_of(shape) == 0) {
    return;
  }
  const int64_t each = shape.taps.taps * shape.taps.outputs * pixels_of(shape) *
                       std::max(int64_t{4}, size_of(dtype));
  const int64_t together =
      std::clamp(args.workspace / std::max(each, int64_t{1}), int64_t{1}, shape.images);
  const Buffer maps(checked_bytes(static_cast<size_t>(together), static_cast<size_t>(each)));
  TapSumArgs sum = {shape.taps, nullptr, args.bias, args.out};
  sum.shape.wide = true;
  for (int64_t image = 0; image < shape.images; image += together) {
    TapMapsArgs part = {shape, nullptr, args.stack, maps.data()};
    part.shape.images = std::min(together, shape.images - image);
    part.x = static_cast<const char*>(args.x) +
             image * shape.channels * pixels_of(shape) * size_of(dtype);
    functions_of(dtype).maps(part, parallel_for);
    for (int64_t i = 0; i < part.shape.images; ++i) {
      sum.maps = maps.as<char>() + i * each;
      sum.out.data =
          static_cast<char*>(args.out.data) + (image + i) * args.out_image * size_of(dtype);
      tap_sum(op, dtype, sum, parallel_for);
    }
  }
}

void tap_picture_gradient(const char* op, FloatType dtype, const TapPictureGradientArgs& args,
                          ParallelFor parallel_for) {
  check_shape(op, args.shape);
  if (args.shape.images * args.shape.channels * pixels_of(args.shape) > 0) {
    functions_of(dtype).picture(args, parallel_for);
  }
}

void tap_stack_gradient(const char* op, FloatType dtype, const TapStackGradientArgs& args,
                        ParallelFor parallel_for) {
  check_shape(op, args.shape);
  if (args.shape.taps.taps * args.shape.taps.outputs * args.shape.channels > 0) {
    functions_of(dtype).stack(args, parallel_for);
  }
}

}  // namespace pydense
