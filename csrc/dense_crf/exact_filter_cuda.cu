// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "common/launch.cuh"
#include "dense_crf/exact_filter.h"
#include "dense_crf/exact_filter_kernels.cuh"

namespace pydense {
namespace {

// The keys are cut so that small pictures, too, have work for all multiprocessors.
constexpr int64_t kWantedBlocks = 4 * kMultiprocessors;
constexpr int64_t kMostSegments = 32;

template <class T>
constexpr int64_t kBlockQueries = int64_t{kExactThreads} * kExactPoints<T>;

struct Segments {
  int64_t count;
  int64_t tiles;  // of each, the last may have fewer

  Segments(int64_t points, int64_t queries, int64_t keys) {
    const int64_t all = ceil_div(points, keys);
    const int64_t wanted = ceil_div(kWantedBlocks, ceil_div(points, queries));
    tiles = ceil_div(all, std::min({wanted, kMostSegments, all}));
    count = ceil_div(all, tiles);
  }
};

template <class T>
Segments segments_of(const ExactFilterArgs<T>& args) {
  const bool any = args.dims > 5;
  return {args.points, kBlockQueries<T>,
          any ? ExactFilter<T, 0, 4>::kKeys : ExactFilter<T, 5, 4>::kKeys};
}

template <class T>
int64_t all_of(const ExactFilterArgs<T>& args) {
  return args.batches * args.channels * args.points;
}

template <class T, int kDims>
void launch(const ExactParams<T>& p, const LaunchConfig& config) {
  const int32_t width = p.chunk_rows;
  if (width <= 4) {
    PYDENSE_LAUNCH((exact_filter_kernel<T, kDims, 4>), config, p);
  } else if (sizeof(T) == sizeof(double) || width <= 8) {
    PYDENSE_LAUNCH((exact_filter_kernel<T, kDims, 8>), config, p);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    if (width <= 16) {
      PYDENSE_LAUNCH((exact_filter_kernel<T, kDims, 16>), config, p);
    } else if (width <= 24) {
      PYDENSE_LAUNCH((exact_filter_kernel<T, kDims, 24>), config, p);
    } else {
      PYDENSE_LAUNCH((exact_filter_kernel<T, kDims, 32>), config, p);
    }
  }
}

}  // namespace

template <class T>
size_t exact_filter_workspace(const ExactFilterArgs<T>& args) {
  const Segments segments = segments_of(args);
  return segments.count == 1 ? 0 : static_cast<size_t>(segments.count * all_of(args)) * sizeof(T);
}

template <class T>
void exact_filter_cuda(const ExactFilterArgs<T>& args, void* workspace, int device, void* stream) {
  constexpr int64_t kMostRows = sizeof(T) == sizeof(float) ? 32 : 8;
  const Segments segments = segments_of(args);
  ExactParams<T> p{};
  p.features = args.features;
  p.values = args.values;
  p.out = segments.count == 1 ? args.out : static_cast<T*>(workspace);
  std::copy_n(args.feature_strides, 3, p.feature_strides);
  std::copy_n(args.value_strides, 3, p.value_strides);
  p.points = args.points;
  p.copies = args.batches / args.feature_batches;
  p.channels = args.channels;
  p.rows = p.copies * args.channels;
  p.all = all_of(args);
  p.dims = static_cast<int32_t>(args.dims);
  const int64_t chunks = ceil_div(p.rows, kMostRows);
  const int64_t query_blocks = ceil_div(args.points, kBlockQueries<T>);
  const int64_t blocks = args.feature_batches * chunks * segments.count * query_blocks;
  PYDENSE_CHECK(chunks <= std::numeric_limits<int32_t>::max() &&
                    blocks <= std::numeric_limits<int32_t>::max(),
                "exact_gaussian_filter: values must have fewer than about 2^43 elements, got ",
                p.all);
  p.query_blocks = static_cast<int32_t>(query_blocks);
  p.row_chunks = static_cast<int32_t>(chunks);
  p.chunk_rows = static_cast<int32_t>(ceil_div(p.rows, chunks));
  p.segments = static_cast<int32_t>(segments.count);
  p.segment_tiles = static_cast<int32_t>(segments.tiles);
  p.self_term = args.self_term;
  const LaunchConfig config = {dim3(static_cast<unsigned>(blocks)), dim3(kExactThreads), 0, device,
                               stream};
  if (args.dims <= 2) {
    launch<T, 2>(p, config);
  } else if (args.dims <= 5) {
    launch<T, 5>(p, config);
  } else {
    launch<T, 0>(p, config);
  }
  if (segments.count > 1) {
    const ExactSumParams<T> sum = {p.out, args.out, p.all, p.segments};
    const LaunchConfig over = {dim3(static_cast<unsigned>(ceil_div(p.all, int64_t{kExactThreads}))),
                               dim3(kExactThreads), 0, device, stream};
    PYDENSE_LAUNCH(exact_sum_kernel<T>, over, sum);
  }
}

#define PYDENSE_INSTANTIATE(T)                                       \
  template size_t exact_filter_workspace(const ExactFilterArgs<T>&); \
  template void exact_filter_cuda(const ExactFilterArgs<T>&, void*, int, void*);
PYDENSE_INSTANTIATE(float)
PYDENSE_INSTANTIATE(double)
#undef PYDENSE_INSTANTIATE

}  // namespace pydense
