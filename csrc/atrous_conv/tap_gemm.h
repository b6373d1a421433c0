// SPDX-License-Identifier: Apache-2.0
// Summed atrous convolutions (tap_maps.h) on a GPU, around matrix products that are torch's. The
// weights of all branches become one matrix, the stack, a row for each tap and output; a product
// makes the map of every row; the maps are shifted and added. Backward, the shifted gradients are
// gathered as the operand of two products.
//
// Maps lie as the pictures do, so that neither is transposed: a row of pixels for each line (tap
// and output), or for channels_last a row of lines for each pixel. Rows are `pitch` elements apart.
//
// Sums go from the biases and the first tap to the last, in float for 16-bit numbers, and are
// rounded once. Nothing is added atomically: the same bits from run to run.
#pragma once

#include <cstdint>

#include "common/float_type.h"

namespace pydense {

constexpr int kMaxTapBranches = 64;
constexpr int kMaxTaps = 8 * kMaxTapBranches + 1;  // the centres of all are one
constexpr int kBranchTaps = 9;

// Where the taps are, from the output that they are added to, and the size of pictures.
struct TapShifts {
  int64_t images;
  int64_t outputs;
  int64_t height;
  int64_t width;
  int64_t taps;
  const int64_t* rows;     // [taps], less than the height in size
  const int64_t* columns;  // [taps], less than the width
};

// Strides are in elements, of any sign.
struct TapStrides {
  int64_t image;
  int64_t channel;
  int64_t row;
  int64_t pixel;
};

// S, the type in memory, is float, double, BFloat16 or Half.
struct TapAddArgs {
  TapShifts shape;
  const void* maps;    // S [images, taps, outputs, pitch], or [images, pixels, pitch]
  int64_t pitch;       // elements
  bool channels_last;  // of the maps
  int num_biases;
  const void* const* biases;  // [num_biases] of S [outputs]
  void* out;                  // S
  TapStrides strides;         // of out
};

struct TapGatherArgs {
  TapShifts shape;
  const void* grad;    // S
  TapStrides strides;  // of grad
  int64_t first;       // the pixels [first, first + count) are made
  int64_t count;
  void* maps;  // S [images, taps, outputs, pitch], or [images, count, pitch]
  int64_t pitch;
  bool channels_last;
};

// Which taps of which branches a row of the stack is the sum of.
struct TapMembers {
  int64_t taps;
  int branches;
  const int64_t* places;  // [branches, 9]: the stack's tap, or -1 for one that reads no pixel
};

struct TapStackArgs {
  TapMembers members;
  const void* const* weights;  // [branches] of S [outputs, channels, 9]
  int64_t first;               // outputs [first, first + count) are stacked
  int64_t count;
  int64_t channels;
  void* stack;  // S [taps, count, channels]
};

// What the stack's gradient is to the weight of one branch.
struct TapUnstackArgs {
  int64_t taps;
  const int64_t* places;  // [9]
  bool wide;              // the stack is float for 16-bit weights
  const void* stack;      // [taps, outputs, channels]
  int64_t outputs;
  int64_t channels;
  void* weight;  // S [outputs, channels, 9]
};

void tap_add_cuda(const char* op, FloatType dtype, const TapAddArgs& args, int device,
                  void* stream);
void tap_gather_cuda(const char* op, FloatType dtype, const TapGatherArgs& args, int device,
                     void* stream);
void tap_stack_cuda(const char* op, FloatType dtype, const TapStackArgs& args, int device,
                    void* stream);
void tap_unstack_cuda(const char* op, FloatType dtype, const TapUnstackArgs& args, int device,
                      void* stream);

}  // namespace pydense
