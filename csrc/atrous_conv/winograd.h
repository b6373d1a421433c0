// SPDX-License-Identifier: Apache-2.0
// Dense 3x3 atrous convolutions of stride 1, padding = rate, in float by Winograd's algorithm. At
// rate r an output reads pixels of its own phase grid, (y mod r, x mod r): each of the r * r grids
// has a plain 3x3 convolution, whose tiles of m x m outputs take (m + 2)^2 multiplications for each
// pair of channels instead of 9 m^2.
//
//   out = relu(conv + bias[o])
//
// Tiles of all grids are the columns of (m + 2)^2 matrix products; they are made, multiplied and
// put together by blocks of bounded size. Tiles at the end of a grid reach beyond it: where grids
// are small they are mostly padding (share_of_direct in pydense/ops/_winograd.py).
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace pydense {

struct WinogradArgs {
  int64_t images;
  int64_t channels;
  int64_t outputs;
  int64_t height;
  int64_t width;
  int64_t rate;
  int tile;  // m: 2, 3 or 4
  bool channels_last;
  const float* x;       // dense, [images, channels, height, width]
  const float* weight;  // [outputs, channels, 3, 3], or, turned round:
  bool flipped;         // [channels, outputs, 3, 3]
  const float* bias;    // [outputs] or null
  bool relu;
  float* out;  // dense, [images, outputs, height, width]
  // The weight lies as a channels_last tensor, the numbers of its second axis side by side.
  bool weight_last = false;
};

void winograd(const char* op, const WinogradArgs& args, ParallelFor parallel_for);

struct WinogradTable {
  void (*of[3])(const WinogradArgs&, ParallelFor);  // tile - 2
};
PYDENSE_DECLARE_CPU_TABLES(WinogradTable, kWinogradTable)

}  // namespace pydense
