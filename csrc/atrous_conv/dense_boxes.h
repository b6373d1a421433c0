// SPDX-License-Identifier: Apache-2.0
// How dense convolutions are cut for a GPU's tensor copies, which move boxes: tiles are rectangles
// of 128 pixels, of the one shape of a few that covers a class of outputs with the least waste.
// What of a box lies beside the picture is copied as zeros; what of a tile lies beside its class is
// computed and not written.
#pragma once

#include <cstdint>
#include <vector>

#include "atrous_conv/dense.h"
#include "common/hd.h"

namespace pydense {

constexpr int kDenseBoxPixels = 1 << 7;
// Rows of a box's columns: 128 x 1, 64 x 2, ... 4 x 32.
constexpr int kDenseBoxShapes = 6;
PYDENSE_HD int32_t dense_box_width(int32_t shape) { return kDenseBoxPixels >> shape; }

constexpr int kMaxDenseBoxClasses = 48;  // of a launch

// Outputs of a branch that read the same taps, a rectangle of every image.
struct DenseBoxClass {
  uint32_t first_item;  // before its own, in the launch
  int32_t y;
  int32_t x;
  int32_t height;
  int32_t width;
  uint32_t tiles_down;
  uint32_t tiles_across;
  uint16_t shape;
  uint16_t first_row;  // taps
  uint16_t num_rows;
  uint16_t first_column;
  uint16_t num_columns;
  uint16_t branch;
};

struct DenseBoxLaunch {
  std::vector<DenseBoxClass> classes;
  int64_t items = 0;  // tiles of pixels, times those of outputs
};

// Launches of at most kMaxDenseBoxClasses classes; items with the longest sums first.
std::vector<DenseBoxLaunch> dense_box_launches(const char* op, const DenseConvArgs* branches,
                                               int count, int64_t columns);

// A tile's image and first pixel, and its first output.
struct DenseBoxTile {
  int32_t image;
  int32_t y;
  int32_t x;
  int32_t output;

  PYDENSE_HD DenseBoxTile(const DenseBoxClass& own, uint32_t item, uint32_t column_tiles,
                          int32_t columns) {
    uint32_t tile = item / column_tiles;
    output = static_cast<int32_t>(item - tile * column_tiles) * columns;
    const uint32_t row = tile / own.tiles_across;
    x = own.x + static_cast<int32_t>(tile - row * own.tiles_across) * dense_box_width(own.shape);
    const uint32_t of_image = row / own.tiles_down;
    y = own.y + static_cast<int32_t>(row - of_image * own.tiles_down) * (1 << own.shape);
    image = static_cast<int32_t>(of_image);
  }
};

// A pixel of a tile, and whether the class has it.
struct DenseBoxPixel {
  int32_t y;
  int32_t x;
  bool inside;

  PYDENSE_HD DenseBoxPixel(const DenseBoxClass& own, const DenseBoxTile& tile, int32_t pixel) {
    const int32_t width = dense_box_width(own.shape);
    y = tile.y + (pixel >> (7 - own.shape));
    x = tile.x + (pixel & (width - 1));
    inside = y < own.y + own.height && x < own.x + own.width;
  }
};

// What tiles of a class add up, in order: all chunks of channels of the first tap, then of the
// next.
struct DenseBoxSteps {
  int32_t chunks;
  int32_t dilation_y;
  int32_t dilation_x;
  int32_t top;
  int32_t left;
  int32_t kernel_width;
  int32_t last_tap;  // of a kernel that is turned round, else -1

  PYDENSE_HD int32_t count(const DenseBoxClass& own) const {
    return own.num_rows * own.num_columns * chunks;
  }
};
struct DenseBoxStep {
  int32_t chunk;
  int32_t y;  // of the picture, where the box begins
  int32_t x;
  int32_t tap;  // in memory

  PYDENSE_HD DenseBoxStep(const DenseBoxSteps& steps, const DenseBoxClass& own,
                          const DenseBoxTile& tile, int32_t step) {
    const int32_t number = step / steps.chunks;
    chunk = step - number * steps.chunks;
    const int32_t row = own.first_row + number / own.num_columns;
    const int32_t column = own.first_column + number % own.num_columns;
    y = tile.y + row * steps.dilation_y - steps.top;
    x = tile.x + column * steps.dilation_x - steps.left;
    const int32_t plain = row * steps.kernel_width + column;
    tap = steps.last_tap < 0 ? plain : steps.last_tap - plain;
  }
};

}  // namespace pydense
