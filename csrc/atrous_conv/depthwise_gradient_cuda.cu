// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/depthwise_gradient_kernels.cuh"
#include "atrous_conv/depthwise_launch.cuh"

namespace pydense {
namespace {

// Blocks for each multiprocessor, and the least that is worth one.
constexpr int64_t kWantedBlocks = 8 * kMultiprocessors;
constexpr int64_t kLeastColumns = 64;
constexpr int64_t kMostSlabs = 256;
constexpr int64_t kThreadColumns = 8;  // of a thread, where lanes are columns

// Channels that a block has at most, whatever the alignment: slabs must not depend on it.
int64_t channel_tiles(const DepthwiseShape& shape) {
  return shape.channels_last ? ceil_div(shape.channels, int64_t{kDepthwiseLanes} * 4)
                             : shape.channels;
}

struct Slabs {
  int64_t columns;
  int64_t slab;
  int64_t count;
};
template <class T>
Slabs slabs_of(const DepthwiseShape& shape, const DepthwiseGeometry<T>& g) {
  const int64_t columns = shape.batches * int64_t{g.positions};
  const int64_t most = std::clamp<int64_t>(columns / kLeastColumns, 1, kMostSlabs);
  const int64_t wanted = std::clamp<int64_t>(
      ceil_div(kWantedBlocks, std::max<int64_t>(1, channel_tiles(shape))), 1, most);
  const int64_t slab = std::max<int64_t>(1, ceil_div(columns, wanted));
  return {columns, slab, std::max<int64_t>(1, ceil_div(columns, slab))};
}

// Columns are cut by the shape alone, too.
template <class T>
DepthwiseGeometry<T> geometry_of(const char* op, const DepthwiseShape& shape,
                                 const DepthwiseSource& x) {
  return depthwise_geometry<T>(op, shape, x, shape.batches * shape.channels);
}

template <class T, int kVector, bool kChannelsLast, bool kColumns>
void launch(const char* op, const DepthwiseGradientArgs& args, void* workspace, int device,
            void* stream) {
  using A = Accumulate<T>;
  const DepthwiseShape& shape = args.shape;
  DepthwiseGradientParams<T> p{};
  p.g = geometry_of<T>(op, shape, args.x);
  p.grad = static_cast<const T*>(args.grad.data);
  p.grad_batch = args.grad.batch;
  p.grad_channel = kChannelsLast ? 1 : args.grad.channel;
  p.grad_row = args.grad.row;
  const Slabs slabs = slabs_of(shape, p.g);
  p.columns = static_cast<uint64_t>(slabs.columns);
  p.slab = static_cast<uint64_t>(slabs.slab);
  p.slabs = static_cast<uint32_t>(slabs.count);
  const int64_t tiles =
      kChannelsLast ? ceil_div(shape.channels, int64_t{kDepthwiseLanes} * kVector) : shape.channels;
  p.channel_tiles = static_cast<uint32_t>(tiles);
  p.sums = static_cast<A*>(workspace);
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  PYDENSE_CHECK(taps <= INT32_MAX / slabs.count, op, ": weight must have less than 2^31 tiles");
  // A power of 2, of 32 at least. What a thread sums alone need not be added to others' sums.
  const int64_t most = kChannelsLast ? slabs.slab * kDepthwiseLanes : slabs.slab / kThreadColumns;
  unsigned threads = 32;
  while (threads < kDepthwiseThreads && threads < most) {
    threads *= 2;
  }
  const LaunchConfig config = {dim3(depthwise_grid(op, slabs.count * (kColumns ? 1 : taps), tiles)),
                               dim3(threads), 0, device, stream};
  PYDENSE_LAUNCH((depthwise_gradient_kernel<T, kVector, kChannelsLast, kColumns>), config, p);

  DepthwiseSumParams<T> sum{};
  sum.sums = p.sums;
  sum.weight = static_cast<T*>(args.weight);
  sum.numbers = shape.channels * taps;
  sum.slabs = p.slabs;
  const LaunchConfig second = {
      dim3(depthwise_grid(op, ceil_div(sum.numbers, int64_t{kDepthwiseThreads}), 1)),
      dim3(kDepthwiseThreads), 0, device, stream};
  PYDENSE_LAUNCH((depthwise_gradient_sum_kernel<T>), second, sum);
}

template <class T, bool kColumns>
void launch_any(const char* op, const DepthwiseGradientArgs& args, void* workspace, int device,
                void* stream) {
  constexpr int kVector = kDepthwiseVector<T>;
  const DepthwiseShape& shape = args.shape;
  if (!shape.channels_last) {
    return launch<T, 1, false, kColumns>(op, args, workspace, device, stream);
  }
  if (depthwise_is_aligned(shape, args.x, sizeof(T), kVector) &&
      depthwise_is_aligned(shape, args.grad, sizeof(T), kVector)) {
    return launch<T, kVector, true, kColumns>(op, args, workspace, device, stream);
  }
  launch<T, 1, true, kColumns>(op, args, workspace, device, stream);
}

}  // namespace

int64_t depthwise_gradient_sums(const char* op, const DepthwiseShape& shape) {
  check_depthwise_shape(op, shape);
  const auto g = geometry_of<float>(op, shape, {});
  return slabs_of(shape, g).count * shape.channels * shape.kernel_height * shape.kernel_width;
}

void depthwise_gradient_cuda(const char* op, FloatType dtype, const DepthwiseGradientArgs& args,
                             void* workspace, int device, void* stream) {
  check_depthwise_shape(op, args.shape);
  if (args.shape.channels == 0) {
    return;
  }
  with_picture_type(dtype, false, [&]<class T>(T, auto) {
    if (runs_down_columns(args.shape)) {
      return launch_any<T, true>(op, args, workspace, device, stream);
    }
    launch_any<T, false>(op, args, workspace, device, stream);
  });
}

}  // namespace pydense
