// SPDX-License-Identifier: Apache-2.0
// Maps of taps. One matrix product makes, of every pixel, what each tap of atrous convolutions adds
// to some output there; summing the maps, each shifted by its tap, completes the convolutions:
//
//   out(o, y, x) = bias[o] + sum over t of maps[t][o](y + rows[t], x + columns[t])
//
// where taps that fall beside the picture add nothing. Backward is the transpose: the map of a tap
// is the gradient shifted the other way,
//
//   maps[t][o](y, x) = grad(o, y - rows[t], x - columns[t]), 0 beside the picture.
//
// Sums go from the bias and the first tap to the last, in float for 16-bit numbers, and are rounded
// once: the same bits for any number of threads, in every layout and on every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/float_type.h"
#include "common/parallel.h"

namespace pydense {

// Of one picture.
struct TapMaps {
  int64_t outputs;
  int64_t height;
  int64_t width;
  int64_t taps;
  const int64_t* rows;     // [taps], of any size and sign
  const int64_t* columns;  // [taps]
  bool wide;               // maps of 16-bit pictures are float
};

// Strides are in elements, of any sign.
struct TapPicture {
  void* data;
  int64_t channel;
  int64_t row;
  int64_t pixel;
};

// S, the type of pictures in memory, is float, double, BFloat16 or Half; M is S, or float.
struct TapSumArgs {
  TapMaps shape;
  const void* maps;  // M [taps, outputs, height, width]
  const void* bias;  // [outputs], double for S double, else float; or null
  TapPicture out;    // S
};

// Writes the maps' rows [first, first + count).
struct TapSpreadArgs {
  TapMaps shape;
  const void* grad;  // S [outputs, height, width]
  int64_t first;
  int64_t count;
  void* maps;  // M [taps, outputs, count, width]
};

void tap_sum(const char* op, FloatType dtype, const TapSumArgs& args, ParallelFor parallel_for);
void tap_spread(const char* op, FloatType dtype, const TapSpreadArgs& args,
                ParallelFor parallel_for);

// By FloatType.
struct TapMapsTable {
  void (*sum[4])(const TapSumArgs&, ParallelFor);
  void (*spread[4])(const TapSpreadArgs&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(TapMapsTable, kTapMapsTable)

}  // namespace pydense
