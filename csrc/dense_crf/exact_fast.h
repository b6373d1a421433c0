// SPDX-License-Identifier: Apache-2.0
// The Gaussian filter over all pairs of points on tensor cores, fast: products of numbers split
// into two of bfloat16, and tiles of pairs that are too far apart left out.
//
// Points are brought into an order first, that of a k-d tree: the box around a run of points is cut
// at the median of its longest side, again and again, down to 32 points. A pair of 32 queries and
// 64 keys whose boxes are so far apart that all its kernel values are below skip_tolerance is left
// out, so an output is wrong for it by less than skip_tolerance times the sum of the values'
// magnitudes. How the rest is rounded, and to how much that comes: exact_fast_kernels.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydense {

constexpr int64_t kMaxFastDims = 10;
constexpr int64_t kOrderTile = 128;  // points of a block; leaves of the tree have 32
constexpr int64_t kOrderKeys = 64;
// Points of all images, those that fill tiles up included.
constexpr int64_t kMaxOrdered = (int64_t{1} << 31) - 1024;

// The order of the points of some images and what is read in it, in one array of 4-byte words.
struct PointOrder {
  int64_t images;
  int64_t points;
  int64_t tiles;    // of an image; the last one is filled up
  int64_t padded;   // points of an image with that
  int width;        // dimensions as stored: zeros above those there are
  int32_t* ids;     // [images, padded]: points, -1 where there is none
  float* features;  // [images, padded / 64, width, 64]; finite where there is no point
  float* keys;      // [images, 2 width, padded / 64]: boxes, lower sides before upper ones
  float* queries;   // [images, 2 width, padded / 32]
};
// With the arrays of `words`, which may be null.
PointOrder point_order(int64_t images, int64_t points, int64_t dims, void* words);
// Words of each tile.
int64_t point_order_words(int64_t dims);

struct PointOrderArgs {
  const float* features;  // [images, dims, points]
  int64_t strides[3];
  int64_t dims;
  PointOrder order;
};
size_t point_order_workspace(const PointOrderArgs& args);
void point_order_cuda(const PointOrderArgs& args, void* workspace, int device, void* stream);

struct ExactFastArgs {
  PointOrder order;
  const float* values;  // [batches, channels, points]
  int64_t value_strides[3];
  float* out;  // [batches, channels, points], contiguous
  int64_t batches;
  int64_t channels;
  bool self_term;
  float skip_tolerance;
};
size_t exact_fast_workspace(const ExactFastArgs& args);
void exact_fast_cuda(const ExactFastArgs& args, void* workspace, int device, void* stream);

}  // namespace pydense
