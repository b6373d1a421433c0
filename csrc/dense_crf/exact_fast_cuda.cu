// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/carver.h"
#include "common/experimental.cuh"
#include "common/launch.cuh"
#include "common/parallel.h"
#include "dense_crf/exact_fast_kernels.cuh"
#include "dense_crf/exact_filter_kernels.cuh"
#include "dense_crf/exact_wgmma.h"

namespace pydense {
namespace {

constexpr int64_t kWantedBlocks = 4 * kMultiprocessors;
constexpr int64_t kMostSegments = 32;
constexpr int64_t kSegmentTiles = 4;  // at least

// How the work is cut; segments depend on the points alone.
struct FastPlan {
  int64_t rows;
  int64_t chunks;
  int64_t width;
  int64_t segments;
  int64_t packed;  // numbers
  int64_t all;     // of the result

  explicit FastPlan(const ExactFastArgs& args) {
    const PointOrder& order = args.order;
    rows = args.batches / order.images * args.channels;
    width = rows <= 8 ? 8 : rows <= 24 ? 24 : 48;
    chunks = ceil_div(rows, width);
    segments = std::min({ceil_div(kWantedBlocks, order.tiles), kMostSegments,
                         ceil_div(order.tiles, kSegmentTiles)});
    packed = order.images * chunks * order.padded * width;
    all = args.batches * args.channels * order.points;
  }
};

struct FastSpace {
  float* packed;
  float* parts;
  size_t bytes;

  FastSpace(const FastPlan& plan, void* memory) {
    Carver carver(memory);
    packed = carver.take<float>(plan.packed);
    parts = carver.take<float>(plan.segments > 1 ? plan.segments * plan.all : 0);
    bytes = carver.used();
  }
};

template <int kWidth>
void launch(const FastParams& p, int64_t packed_blocks, int64_t blocks, int device, void* stream) {
  const LaunchConfig pack = {dim3(static_cast<unsigned>(packed_blocks)), dim3(kWidth * 16), 0,
                             device, stream};
  PYDENSE_LAUNCH(fast_pack_kernel<kWidth>, pack, p);
  if (p.swizzled) {
    exact_wgmma_cuda(p, kWidth, blocks, device, stream);
    return;
  }
  const LaunchConfig config = {dim3(static_cast<unsigned>(blocks)), dim3(kFastThreads), 0, device,
                               stream};
  if (p.order.width == 5) {
    PYDENSE_LAUNCH((exact_fast_kernel<5, kWidth>), config, p);
  } else {
    PYDENSE_LAUNCH((exact_fast_kernel<10, kWidth>), config, p);
  }
}

}  // namespace

size_t exact_fast_workspace(const ExactFastArgs& args) {
  return FastSpace(FastPlan(args), nullptr).bytes;
}

void exact_fast_cuda(const ExactFastArgs& args, void* workspace, int device, void* stream) {
  const PointOrder& order = args.order;
  const FastPlan plan(args);
  const FastSpace space(plan, workspace);
  FastParams p{};
  p.order = order;
  p.values = args.values;
  std::copy_n(args.value_strides, 3, p.value_strides);
  p.packed = space.packed;
  p.out = plan.segments > 1 ? space.parts : args.out;
  p.rows = plan.rows;
  p.channels = args.channels;
  p.copies = args.batches / order.images;
  p.all = plan.all;
  p.row_chunks = static_cast<int32_t>(plan.chunks);
  p.chunk_rows = static_cast<int32_t>(ceil_div(plan.rows, plan.chunks));
  p.segments = static_cast<int32_t>(plan.segments);
  p.limit = args.skip_tolerance > 0 ? -2 * std::log(args.skip_tolerance)
                                    : std::numeric_limits<float>::infinity();
  p.self_term = args.self_term;
  p.swizzled = experimental_sm90_kernels(device);
  const int64_t packed_blocks = order.images * plan.chunks * (order.padded / kOrderKeys);
  const int64_t blocks = order.images * plan.segments * plan.chunks * order.tiles;
  PYDENSE_CHECK(std::max(packed_blocks, blocks) <= std::numeric_limits<int32_t>::max() &&
                    order.padded <= int64_t{1} << 33,
                "exact_gaussian_filter_fast: values must have fewer than about 2^40 elements, got ",
                plan.all);
  if (plan.width == 8) {
    launch<8>(p, packed_blocks, blocks, device, stream);
  } else if (plan.width == 24) {
    launch<24>(p, packed_blocks, blocks, device, stream);
  } else {
    launch<48>(p, packed_blocks, blocks, device, stream);
  }
  if (plan.segments > 1) {
    const ExactSumParams<float> sum = {space.parts, args.out, plan.all, p.segments};
    const LaunchConfig over = {
        dim3(static_cast<unsigned>(ceil_div(plan.all, int64_t{kExactThreads}))),
        dim3(kExactThreads), 0, device, stream};
    PYDENSE_LAUNCH(exact_sum_kernel<float>, over, sum);
  }
}

}  // namespace pydense
