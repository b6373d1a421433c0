// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/depthwise_kernels.cuh"
#include "atrous_conv/depthwise_launch.cuh"

namespace pydense {
namespace {

constexpr int64_t kMostRounds = 16;

template <class T>
DepthwiseParams<T> params_of(const char* op, const DepthwiseArgs& args, int64_t beside) {
  DepthwiseParams<T> p{};
  p.g = depthwise_geometry<T>(op, args.shape, args.x, beside);
  p.weight = static_cast<const T*>(args.weight);
  p.bias = static_cast<const T*>(args.bias);
  p.out = static_cast<T*>(args.out);
  p.flipped = args.flipped;
  p.relu = args.relu;
  return p;
}

template <class T, bool kColumns>
void launch_contiguous(const char* op, const DepthwiseArgs& args, int device, void* stream) {
  const int64_t planes = args.shape.batches * args.shape.channels;
  auto p = params_of<T>(op, args, planes);
  // Blocks of one plane are even parts of it.
  const int64_t chunks = ceil_div(int64_t{p.g.positions}, int64_t{kDepthwiseThreads});
  const int64_t threads = ceil_div(ceil_div(int64_t{p.g.positions}, chunks), int64_t{32}) * 32;
  p.chunks = static_cast<uint32_t>(chunks);
  const LaunchConfig config = {dim3(depthwise_grid(op, planes, chunks)),
                               dim3(static_cast<unsigned>(threads)), 0, device, stream};
  PYDENSE_LAUNCH((depthwise_kernel<T, kColumns>), config, p);
}

template <class T, int kVector, bool kColumns>
void launch_last(const char* op, const DepthwiseArgs& args, int device, void* stream) {
  const DepthwiseShape& shape = args.shape;
  const int64_t tiles = ceil_div(shape.channels, int64_t{kDepthwiseLanes} * kVector);
  auto p = params_of<T>(op, args, shape.batches * tiles * kDepthwiseLanes);
  const int64_t threads = int64_t{p.g.positions} * shape.batches * tiles * kDepthwiseLanes;
  p.rounds =
      static_cast<int32_t>(std::clamp<int64_t>(threads / kDepthwiseWantedThreads, 1, kMostRounds));
  p.channel_tiles = static_cast<uint32_t>(tiles);
  const int64_t chunks = ceil_div(int64_t{p.g.positions}, int64_t{kDepthwiseRows} * p.rounds);
  p.chunks = static_cast<uint32_t>(chunks);
  const LaunchConfig config = {dim3(depthwise_grid(op, shape.batches * chunks, tiles)),
                               dim3(kDepthwiseThreads), 0, device, stream};
  PYDENSE_LAUNCH((depthwise_last_kernel<T, kVector, kColumns>), config, p);
}

template <class T, bool kColumns>
void launch(const char* op, const DepthwiseArgs& args, int device, void* stream) {
  constexpr int kVector = kDepthwiseVector<T>;
  if (!args.shape.channels_last) {
    return launch_contiguous<T, kColumns>(op, args, device, stream);
  }
  if (depthwise_is_aligned(args.shape, args.x, sizeof(T), kVector) &&
      depthwise_is_aligned(args.bias, sizeof(T), kVector) &&
      depthwise_is_aligned(args.out, sizeof(T), kVector)) {
    return launch_last<T, kVector, kColumns>(op, args, device, stream);
  }
  launch_last<T, 1, kColumns>(op, args, device, stream);
}

}  // namespace

void depthwise_cuda(const char* op, FloatType dtype, const DepthwiseArgs& args, int device,
                    void* stream) {
  check_depthwise_shape(op, args.shape);
  if (args.shape.batches == 0 || args.shape.channels == 0) {
    return;
  }
  with_picture_type(dtype, false, [&]<class T>(T, auto) {
    if (runs_down_columns(args.shape)) {
      return launch<T, true>(op, args, device, stream);
    }
    launch<T, false>(op, args, device, stream);
  });
}

}  // namespace pydense
