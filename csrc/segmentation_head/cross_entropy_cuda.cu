// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "common/parallel.h"
#include "segmentation_head/cross_entropy_kernels.cuh"
#include "segmentation_head/head_launch.cuh"

namespace pydense {
namespace {

constexpr int kMostRows = 16;   // of a block
constexpr int kMostChunk = 32;  // classes in shared memory
constexpr int kSmallest = 64;   // threads of a block

template <class T>
int nominal_fragments(const AxisMap<T>& x) {
  // Rounding may give a cell one output more: it takes a second turn.
  const double outputs = x.grid == AxisGrid::kIdentity ? 1.0
                         : x.step > 0                  ? std::round(1 / static_cast<double>(x.step))
                                                       : static_cast<double>(x.out_size);
  // At least two cells in a block: the first of all needs the logits of the second.
  return static_cast<int>(std::clamp(outputs, 1.0, kSmallest / 2.0));
}

}  // namespace

template <class T>
CrossEntropyPlan plan_cross_entropy(const LogitsView& logits, const HeadAxes<T>& axes,
                                    bool gradient, int64_t enough_tiles) {
  CrossEntropyPlan plan{};
  const int64_t cells = logits.width + 1;
  plan.fragments = nominal_fragments(axes.x);
  double best = 0;
  for (int threads = kCrossEntropyThreads; threads >= kSmallest; threads -= 32) {
    const int64_t tiles = ceil_div(cells, threads / plan.fragments);
    const double busy =
        static_cast<double>(cells * plan.fragments) / static_cast<double>(tiles) / threads;
    if (busy > best) {
      best = busy;
      plan.threads = threads;
      plan.tiles_x = tiles;
    }
  }
  plan.cells = static_cast<int>(ceil_div(cells, plan.tiles_x));
  plan.tiles_x = ceil_div(cells, plan.cells);
  plan.rows = static_cast<int>(std::clamp<int64_t>(
      logits.images * plan.tiles_x * logits.height / enough_tiles, 1, kMostRows));
  plan.tiles_y = ceil_div(logits.height, plan.rows);
  plan.blocks = logits.images * plan.tiles_x * plan.tiles_y;
  plan.chunk = static_cast<int>(
      std::min<int64_t>(ceil_div(logits.classes, kClassGroup) * kClassGroup, kMostChunk));
  // An odd number of groups: columns of logits then lie in different banks.
  plan.pitch = plan.chunk / kClassGroup % 2 == 1 ? plan.chunk : plan.chunk + kClassGroup;
  const auto values = static_cast<size_t>(2 * (plan.cells + 1) * plan.pitch) +
                      (gradient ? static_cast<size_t>(8 * kClassGroup * plan.threads) : 0);
  plan.shared_bytes =
      values * sizeof(T) + static_cast<size_t>(plan.cells + plan.rows + 2) * sizeof(int);
  if (gradient) {
    plan.halo_rows = logits.images * logits.classes * plan.tiles_y * logits.width;
    plan.halo_columns =
        logits.images * plan.tiles_x * plan.tiles_y * (plan.rows + 1) * logits.classes;
  }
  return plan;
}

template <class T>
void upsample_cross_entropy_cuda(const CrossEntropyCudaArgs<T>& args, const CrossEntropyPlan& plan,
                                 int device, void* stream) {
  constexpr const char* kOp = "upsample_cross_entropy";
  check_head(kOp, args.logits, args.axes);
  PYDENSE_CHECK(args.smoothing >= 0 && args.smoothing <= 1, kOp,
                ": label_smoothing must be in [0, 1], got ", args.smoothing);
  if (plan.blocks > 0) {
    const LaunchConfig config = {dim3(static_cast<unsigned>(plan.blocks)),
                                 dim3(static_cast<unsigned>(plan.threads)), plan.shared_bytes,
                                 device, stream};
    PYDENSE_CHECK(plan.blocks <= std::numeric_limits<int32_t>::max(), kOp,
                  ": logits must have fewer pixels, got ", plan.blocks, " tiles");
    PYDENSE_LAUNCH(cross_entropy_kernel<T>, config, args, plan);
  }
  int64_t blocks = 1;
  if (args.gradient != nullptr && plan.blocks > 0) {
    const int64_t shared =
        args.logits.images * args.logits.classes *
        ((plan.tiles_y - 1) * args.logits.width + (plan.tiles_x - 1) * args.logits.height);
    blocks += std::min<int64_t>(ceil_div(shared, kFinishThreads), int64_t{1} << 20);
  }
  const LaunchConfig config = {dim3(static_cast<unsigned>(blocks)), dim3(kFinishThreads), 0, device,
                               stream};
  PYDENSE_LAUNCH(cross_entropy_finish_kernel<T>, config, args, plan);
}

#define PYDENSE_INSTANTIATE(T)                                                              \
  template CrossEntropyPlan plan_cross_entropy(const LogitsView&, const HeadAxes<T>&, bool, \
                                               int64_t);                                    \
  template void upsample_cross_entropy_cuda(const CrossEntropyCudaArgs<T>&,                 \
                                            const CrossEntropyPlan&, int, void*);
PYDENSE_INSTANTIATE(float)
PYDENSE_INSTANTIATE(double)

}  // namespace pydense
