// SPDX-License-Identifier: Apache-2.0
// Dense atrous convolution with stride 1, as a matrix product of every tap:
//
//   out(o, y, x) = f(scale[o] * sum over (c, i, j) of
//                    weight[o][c][i][j] x(c, y + i * dilation_y - top, x + j * dilation_x - left)
//                    + bias[o])
//
// where what lies beside the picture is left out, not multiplied. The gradient of x is the same sum
// over the output's gradient, the kernel turned round and outputs and channels exchanged.
//
// Sums are float for 16-bit numbers and rounded once. A result's go from the first tap to the last,
// and of each over parts of the channels (common/gemm/gemm_parts.h), which no thread cuts: the same
// bits for any number of threads, in both memory formats, and on all instruction sets with fused
// multiply-add, but where pairs of bfloat16 are multiplied (common/gemm/gemm_bf16.h).
#pragma once

#include "atrous_conv/tap_segments.h"
#include "common/cpu_isa.h"
#include "common/float_type.h"
#include "common/parallel.h"

namespace pydense {

struct DenseConvShape {
  int64_t batches;
  int64_t channels;
  int64_t outputs;
  int64_t height;  // of x
  int64_t width;
  int64_t out_height;
  int64_t out_width;
  int64_t kernel_height;
  int64_t kernel_width;
  int64_t dilation_y;
  int64_t dilation_x;
  int64_t top;  // padding, of any sign
  int64_t left;

  int64_t taps() const { return kernel_height * kernel_width; }
};

// Strides are in elements. Either channels or the pixels of a row lie side by side.
struct DenseConvPicture {
  const void* data;
  int64_t batch;
  int64_t channel;
  int64_t row;
  int64_t pixel;

  bool channels_last() const { return channel == 1; }
};
struct DenseConvTarget {
  void* data;
  int64_t batch;
  int64_t channel;
  int64_t row;
  int64_t pixel;
};

// The weight of (output, channel, tap), for the shape's outputs, channels and taps; strides are in
// elements. `flipped`: taps from the last to the first.
struct DenseConvWeight {
  const void* data;
  int64_t output;
  int64_t channel;
  int64_t tap;
  bool flipped;
};

// S, the type in memory, is float, double, BFloat16 or Half; T is double for double, else float.
struct DenseConvArgs {
  DenseConvShape shape;
  DenseConvPicture x;      // S
  DenseConvWeight weight;  // S
  const void* packed;      // the weight as dense_conv_pack (dense_conv_cuda_pack) left it, or null
  const void* scale;       // T [outputs], or null
  const void* bias;        // T [outputs], or null
  bool relu;               // of the result; a NaN stays one
  DenseConvTarget out;     // S
  const void* rows = nullptr;  // x as dense_conv_rows left it, or null; the CPU's alone
};

// Throws std::invalid_argument for sizes out of range.
void dense_conv_check(const char* op, const DenseConvShape& shape);

void dense_conv(const char* op, FloatType dtype, const DenseConvArgs& args,
                ParallelFor parallel_for);

// A weight in the order in which the product reads it, for the current instruction set. Of the
// shape, outputs, channels and the kernel's size count.
int64_t dense_conv_packed_bytes(const char* op, FloatType dtype, const DenseConvShape& shape);
void dense_conv_pack(const char* op, FloatType dtype, const DenseConvShape& shape,
                     const DenseConvWeight& weight, void* packed, ParallelFor parallel_for);

// The pixels of x in the order in which the product reads them, for all convolutions of one x. Of
// the shape, batches, channels, height and width count; 0 bytes: they are read where they are.
int64_t dense_conv_rows_bytes(const char* op, FloatType dtype, const DenseConvShape& shape,
                              const DenseConvPicture& x);
void dense_conv_rows(const char* op, FloatType dtype, const DenseConvShape& shape,
                     const DenseConvPicture& x, void* rows, ParallelFor parallel_for);

// What the kernels need besides: the taps along both axes.
struct DenseConvPlan {
  const TapSegment* rows;
  int64_t num_rows;
  const TapSegment* columns;
  int64_t num_columns;
};

struct DenseConvFunctions {
  void (*run)(const DenseConvArgs&, const DenseConvPlan&, ParallelFor);
  int64_t (*packed_bytes)(const DenseConvShape&);
  void (*pack)(const DenseConvShape&, const DenseConvWeight&, void*, ParallelFor);
  int64_t (*rows_bytes)(const DenseConvShape&, const DenseConvPicture&);
  void (*rows)(const DenseConvShape&, const DenseConvPicture&, void*, ParallelFor);
};
// By FloatType.
struct DenseConvTable {
  DenseConvFunctions of[4];
};
PYDENSE_DECLARE_CPU_TABLES(DenseConvTable, kDenseConvTable)
#if defined(PYDENSE_X86_KERNELS)
namespace avx512_bf16 {
extern const DenseConvFunctions kDenseConvBFloat16;
}
#endif

}  // namespace pydense
