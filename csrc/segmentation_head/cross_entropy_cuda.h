// SPDX-License-Identifier: Apache-2.0
// Cross-entropy of upsampled logits on CUDA: what segmentation_head.h says of it holds here too,
// but for a label that is neither a class nor ignored, of which no exception can tell without
// waiting for the device: its loss, and what it adds to the gradient, is NaN.
#pragma once

#include "segmentation_head/segmentation_head.h"

namespace pydense {

// What one block adds to the sums. Double and int64 are of one size: a block of memory of doubles
// holds such records.
struct CrossEntropyPartial {
  double loss;
  double weight;
  int64_t valid;
  int64_t correct;
};

// How the work is cut. A cell of columns is the outputs between two columns of logits; those before
// the first column are a cell of their own, so that no cell is wider than the others. A block owns
// `cells` of these and `rows` rows of cells; a thread a
// column of one cell.
struct CrossEntropyPlan {
  int threads;
  int fragments;  // threads of a cell
  int cells;
  int rows;
  int64_t tiles_x;
  int64_t tiles_y;
  int64_t blocks;
  int chunk;  // classes in shared memory at a time,
  int pitch;  // and the elements between two of their columns
  size_t shared_bytes;
  // Gradients of logits that two tiles share: the lower tile's and the right tile's first row and
  // column have the tile's own part in `gradient` and the other's here, [images, classes, tiles_y,
  // width] in the format of the gradient and [images, tiles_x, tiles_y (rows + 1), classes].
  int64_t halo_rows;
  int64_t halo_columns;  // elements of each
};

enum class CrossEntropyDivisor : int32_t { kOne, kWeight, kPixels };

template <class T>
struct CrossEntropyCudaArgs : CrossEntropyTerms<T> {
  HeadAxes<T> axes;
  CrossEntropyDivisor divisor;
  T* total;                       // the sum of the losses over the divisor, or null
  double* scale;                  // 1 / divisor, 0 where that is 0
  int64_t* counts;                // correct, valid
  CrossEntropyPartial* partials;  // [plan.blocks]
  T* halo;                        // [plan.halo_rows + plan.halo_columns], with a gradient
};

// So many blocks, where there are as many rows of cells, fill any of today's GPUs; with more of
// them blocks only share more logits with each other.
constexpr int64_t kEnoughTiles = 1024;
template <class T>
CrossEntropyPlan plan_cross_entropy(const LogitsView& logits, const HeadAxes<T>& axes,
                                    bool gradient, int64_t enough_tiles = kEnoughTiles);

template <class T>
void upsample_cross_entropy_cuda(const CrossEntropyCudaArgs<T>& args, const CrossEntropyPlan& plan,
                                 int device, void* stream);

}  // namespace pydense
