// SPDX-License-Identifier: Apache-2.0
// Max pooling with stride 1 that keeps the size, padding that never wins: torch's max_pool2d with
// padding k / 2. Where an output's maximum lies is one byte: row << 4 | column in its window.
//
// The maximum is the first one in row-major order, a NaN wins over every number and a later NaN
// over an earlier one, and a window that holds -inf alone has its first element as maximum. Results
// have the same bits for any number of threads and on every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/float_type.h"
#include "common/parallel.h"

namespace pydense {

constexpr int kMinPoolSize = 3;
constexpr int kMaxPoolSize = 13;

struct PoolShape {
  int64_t batches;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool channels_last;  // of everything
  int size;            // of the window, odd
};

// No number in pictures of this shape.
bool is_empty(const PoolShape& shape);

// Rows of one channel (channels_last false), or of all channels, pixel by pixel, are contiguous.
// Strides are in elements, of any sign. channel is 1 for channels_last.
struct PoolSource {
  const void* data;
  int64_t batch;
  int64_t channel;
  int64_t row;
};

// S, the type in memory, is float, double, BFloat16 or Half.
struct MaxPoolArgs {
  PoolShape shape;
  PoolSource x;
  void* out;         // S, dense
  uint8_t* offsets;  // dense, or null
};

struct MaxPoolBackwardArgs {
  PoolShape shape;
  PoolSource grad;
  const uint8_t* offsets;  // dense
  const void* addend;      // S, dense, added to the result; or null
  void* result;            // S, dense
};

void check_pool_shape(const char* op, const PoolShape& shape);

void max_pool_forward(const char* op, FloatType dtype, const MaxPoolArgs& args,
                      ParallelFor parallel_for);
void max_pool_backward(const char* op, FloatType dtype, const MaxPoolBackwardArgs& args,
                       ParallelFor parallel_for);

// On a GPU, with the same results.
void max_pool_forward_cuda(const char* op, FloatType dtype, const MaxPoolArgs& args, int device,
                           void* stream);
void max_pool_backward_cuda(const char* op, FloatType dtype, const MaxPoolBackwardArgs& args,
                            int device, void* stream);

// By FloatType.
struct MaxPoolTable {
  void (*forward[4])(const MaxPoolArgs&, ParallelFor);
  void (*backward[4])(const MaxPoolBackwardArgs&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(MaxPoolTable, kMaxPoolTable)

}  // namespace pydense
