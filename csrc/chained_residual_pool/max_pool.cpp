// SPDX-License-Identifier: Apache-2.0
#include "chained_residual_pool/max_pool.h"

#include "common/check.h"

namespace pydense {
namespace {

const MaxPoolTable& table() {
  return select_cpu_table<MaxPoolTable>(PYDENSE_CPU_TABLES(kMaxPoolTable));
}

}  // namespace

bool is_empty(const PoolShape& shape) { return shape.batches == 0 || shape.channels == 0; }

void check_pool_shape(const char* op, const PoolShape& shape) {
  PYDENSE_CHECK(shape.size >= kMinPoolSize && shape.size <= kMaxPoolSize && shape.size % 2 == 1, op,
                ": kernel_size must be odd and in [", kMinPoolSize, ", ", kMaxPoolSize, "], got ",
                shape.size);
  PYDENSE_CHECK(shape.batches >= 0 && shape.channels >= 0, op,
                ": batch and channels must not be negative, got ", shape.batches, " and ",
                shape.channels);
  PYDENSE_CHECK(shape.height >= 1 && shape.width >= 1, op,
                ": x must have at least one pixel, got size (", shape.height, ", ", shape.width,
                ")");
}

void max_pool_forward(const char* op, FloatType dtype, const MaxPoolArgs& args,
                      ParallelFor parallel_for) {
  check_pool_shape(op, args.shape);
  if (!is_empty(args.shape)) {
    table().forward[static_cast<int>(dtype)](args, parallel_for);
  }
}

void max_pool_backward(const char* op, FloatType dtype, const MaxPoolBackwardArgs& args,
                       ParallelFor parallel_for) {
  check_pool_shape(op, args.shape);
  if (!is_empty(args.shape)) {
    table().backward[static_cast<int>(dtype)](args, parallel_for);
  }
}

}  // namespace pydense
