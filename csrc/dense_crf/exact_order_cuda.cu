// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <utility>

#include "common/carver.h"
#include "common/device_sort.h"
#include "common/launch.cuh"
#include "common/parallel.h"
#include "dense_crf/exact_order_kernels.cuh"

namespace pydense {
namespace {

int width_of(int64_t dims) { return dims <= 5 ? 5 : 10; }

struct OrderSpace {
  int32_t* ids;
  int32_t* sides;
  uint64_t* keys;
  uint64_t* sorted;
  char* sort;
  size_t sort_bytes;
  size_t bytes;

  OrderSpace(const PointOrder& order, void* memory) {
    const int64_t all = order.images * order.padded;
    Carver carver(memory);
    ids = carver.take<int32_t>(all);
    sides = carver.take<int32_t>(2 * order.images * order.tiles);
    keys = carver.take<uint64_t>(all);
    sorted = carver.take<uint64_t>(all);
    sort_bytes = device_sort_bytes(all);
    sort = carver.take<char>(static_cast<int64_t>(sort_bytes));
    bytes = carver.used();
  }
};

LaunchConfig over(int64_t items, int device, void* stream) {
  return {dim3(static_cast<unsigned>(ceil_div(items, int64_t{kOrderThreads}))), dim3(kOrderThreads),
          0, device, stream};
}

}  // namespace

int64_t point_order_words(int64_t dims) {
  // A number of each point and dimension, and the boxes of 2 runs of keys and 4 of queries.
  return kOrderTile + (kOrderTile + 12) * width_of(dims);
}

PointOrder point_order(int64_t images, int64_t points, int64_t dims, void* words) {
  PointOrder order{};
  order.images = images;
  order.points = points;
  order.tiles = ceil_div(points, kOrderTile);
  order.padded = order.tiles * kOrderTile;
  order.width = width_of(dims);
  if (words != nullptr) {
    const int64_t all = images * order.padded;
    order.ids = static_cast<int32_t*>(words);
    order.features = static_cast<float*>(words) + all;
    order.keys = order.features + all * order.width;
    order.queries = order.keys + images * order.tiles * 4 * order.width;
  }
  return order;
}

size_t point_order_workspace(const PointOrderArgs& args) {
  return OrderSpace(args.order, nullptr).bytes;
}

void point_order_cuda(const PointOrderArgs& args, void* workspace, int device, void* stream) {
  const PointOrder& order = args.order;
  const int64_t all = order.images * order.padded;
  static_assert(kMaxOrdered + kOrderThreads <= std::numeric_limits<int32_t>::max());
  const OrderSpace space(order, workspace);
  int levels = 0;  // of whole tiles
  while ((int64_t{1} << levels) < order.tiles) {
    ++levels;
  }
  // Sorted from one array into the other; the last level ends in the result.
  int32_t* from = (levels + 2) % 2 == 0 ? order.ids : space.ids;
  int32_t* to = from == order.ids ? space.ids : order.ids;
  PYDENSE_LAUNCH(order_begin_kernel, over(all, device, stream), from, order.points, order.padded,
                 all);
  OrderParams p{};
  p.features = args.features;
  std::copy_n(args.strides, 3, p.strides);
  p.points = order.points;
  p.dims = static_cast<int32_t>(args.dims);
  p.images = static_cast<int32_t>(order.images);
  p.sides = space.sides;
  p.keys = space.keys;
  p.level.tiles = order.tiles;
  p.level.padded = order.padded;
  for (int level = 0; level < levels + 2; ++level) {
    p.level.level = level;
    p.level.parts = level < levels ? 0 : level - levels + 1;
    p.level.nodes =
        static_cast<int32_t>(level < levels ? int64_t{1} << level : order.tiles * p.level.parts);
    p.ids = from;
    const int64_t nodes = order.images * p.level.nodes;
    const LaunchConfig each = {dim3(static_cast<unsigned>(nodes)), dim3(kOrderThreads), 0, device,
                               stream};
    PYDENSE_LAUNCH(order_sides_kernel, each, p);
    PYDENSE_LAUNCH(order_keys_kernel, over(all, device, stream), p);
    int bits = 32;
    while (nodes > int64_t{1} << (bits - 32)) {
      ++bits;
    }
    sort_pairs_cuda({space.keys, space.sorted, from, to, all, bits}, space.sort, space.sort_bytes,
                    device, stream);
    std::swap(from, to);
  }
  OrderFinishParams finish{};
  finish.features = args.features;
  std::copy_n(args.strides, 3, finish.strides);
  finish.points = order.points;
  finish.dims = p.dims;
  finish.order = order;
  PYDENSE_LAUNCH(order_finish_kernel, over(all / 2, device, stream), finish);
}

}  // namespace pydense
