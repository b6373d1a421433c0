// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/dense_boxes.h"

#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"

namespace pydense {
namespace {

// The shape with the fewest tiles; of several, the widest, whose rows are longest in memory.
void choose_shape(DenseBoxClass& own) {
  int64_t least = 0;
  for (int32_t shape = 0; shape < kDenseBoxShapes; ++shape) {
    const int64_t across = ceil_div(int64_t{own.width}, int64_t{dense_box_width(shape)});
    const int64_t down = ceil_div(int64_t{own.height}, int64_t{1} << shape);
    if (shape == 0 || across * down < least) {
      least = across * down;
      own.shape = static_cast<uint16_t>(shape);
      own.tiles_across = static_cast<uint32_t>(across);
      own.tiles_down = static_cast<uint32_t>(down);
    }
  }
}

}  // namespace

std::vector<DenseBoxLaunch> dense_box_launches(const char* op, const DenseConvArgs* branches,
                                               int count, int64_t columns) {
  std::vector<DenseBoxClass> classes;
  for (int b = 0; b < count; ++b) {
    const DenseConvShape& s = branches[b].shape;
    PYDENSE_CHECK(s.kernel_height <= UINT16_MAX && s.kernel_width <= UINT16_MAX, op,
                  ": kernel size must be below 65536 on CUDA, got (", s.kernel_height, ", ",
                  s.kernel_width, ")");
    for (const TapSegment& row :
         tap_segments(s.kernel_height, s.dilation_y, s.top, s.height, s.out_height)) {
      for (const TapSegment& column :
           tap_segments(s.kernel_width, s.dilation_x, s.left, s.width, s.out_width)) {
        const bool empty = row.first == row.last || column.first == column.last;
        DenseBoxClass own = {};
        own.y = static_cast<int32_t>(row.begin);
        own.x = static_cast<int32_t>(column.begin);
        own.height = static_cast<int32_t>(row.end - row.begin);
        own.width = static_cast<int32_t>(column.end - column.begin);
        own.first_row = static_cast<uint16_t>(row.first);
        own.num_rows = static_cast<uint16_t>(empty ? 0 : row.last - row.first);
        own.first_column = static_cast<uint16_t>(column.first);
        own.num_columns = static_cast<uint16_t>(empty ? 0 : column.last - column.first);
        own.branch = static_cast<uint16_t>(b);
        choose_shape(own);
        classes.push_back(own);
      }
    }
  }
  std::stable_sort(classes.begin(), classes.end(),
                   [](const DenseBoxClass& a, const DenseBoxClass& b) {
                     return a.num_rows * a.num_columns > b.num_rows * b.num_columns;
                   });
  std::vector<DenseBoxLaunch> launches;
  for (DenseBoxClass& own : classes) {
    if (launches.empty() || launches.back().classes.size() == kMaxDenseBoxClasses) {
      launches.emplace_back();
    }
    DenseBoxLaunch& launch = launches.back();
    const DenseConvShape& s = branches[own.branch].shape;
    own.first_item = static_cast<uint32_t>(launch.items);
    launch.classes.push_back(own);
    const int64_t tiles = int64_t{own.tiles_across} * own.tiles_down;
    PYDENSE_CHECK(tiles <= INT32_MAX / std::max<int64_t>(s.batches, 1), op,
                  ": x must have less than 2^31 tiles, got ", s.batches, " x ", tiles);
    launch.items += s.batches * tiles * ceil_div(s.outputs, columns);
    PYDENSE_CHECK(launch.items <= INT32_MAX, op, ": x must have less than 2^31 tiles, got ",
                  launch.items);
  }
  return launches;
}

}  // namespace pydense
