// SPDX-License-Identifier: Apache-2.0
// How dense convolutions on a GPU are cut into tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "atrous_conv/dense.h"

namespace pydense {

constexpr int kDenseRows = 128;       // pixels of a tile, at most
constexpr int kDenseGroup = 16;       // of which a multiple is multiplied
constexpr int kDenseColumns = 32;     // outputs of a warp
constexpr int kMaxDenseBranches = 8;  // of a launch
constexpr int kMaxDenseClasses = 48;

// Outputs of a branch that read the same taps: a rectangle of every image, cut into tiles. A tile
// has all the rectangle's taps and channels, or one of `splits` even parts of them. Pixels are
// counted row by row; rows in the order of phases of `rate` (phase_tiles.h).
struct DenseClass {
  uint32_t first_item;  // blocks before its own, in the launch
  uint32_t first_sum;   // tiles before its own whose parts must be added
  uint32_t first_part;  // and parts
  uint32_t pixels;      // of all images
  int32_t y;
  int32_t x;
  int32_t height;
  int32_t width;
  uint16_t tile_pixels;  // a multiple of kDenseGroup
  uint16_t splits;
  uint16_t first_row;  // taps
  uint16_t num_rows;
  uint16_t first_column;
  uint16_t num_columns;
  uint16_t branch;
  uint16_t rate;
};

struct DenseLaunch {
  std::vector<DenseClass> classes;
  int64_t items = 0;
  int64_t sums = 0;
  int64_t parts = 0;
};

// One launch for every kMaxDenseClasses classes. A tile has `columns` outputs and is summed in
// steps of `depth` channels.
std::vector<DenseLaunch> dense_launches(const char* op, const DenseConvArgs* branches, int count,
                                        int64_t columns, int64_t depth);

}  // namespace pydense
