// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "atrous_conv/tap_gemm_kernels.cuh"
#include "common/parallel.h"
#include "common/picture_launch.cuh"

namespace pydense {
namespace {

constexpr int64_t kMost = int64_t{1} << 30;

// Checks what is counted in 32 bits.
void check_shifts(const char* op, const TapShifts& shape) {
  PYDENSE_CHECK(shape.taps >= 0 && shape.taps <= kMaxTaps, op, ": taps must be at most ", kMaxTaps,
                ", got ", shape.taps);
  PYDENSE_CHECK(shape.height < kMost && shape.width < kMost && shape.outputs < kMost &&
                    shape.height * shape.width < kMost,
                op, ": pictures must have less than 2^30 pixels, got ", shape.height, " x ",
                shape.width);
  for (int64_t t = 0; t < shape.taps; ++t) {
    PYDENSE_CHECK(
        std::abs(shape.rows[t]) < shape.height && std::abs(shape.columns[t]) < shape.width, op,
        ": taps must reach pixels of ", shape.height, " x ", shape.width, ", got (", shape.rows[t],
        ", ", shape.columns[t], ")");
  }
}

void fill_table(const TapShifts& shape, TapTable& table) {
  table.taps = static_cast<int32_t>(shape.taps);
  for (int64_t t = 0; t < shape.taps; ++t) {
    table.rows[t] = static_cast<int32_t>(shape.rows[t]);
    table.columns[t] = static_cast<int32_t>(shape.columns[t]);
    table.shifts[t] = static_cast<int32_t>(shape.rows[t] * shape.width + shape.columns[t]);
  }
}

// Of a block that shares `items` with others of its size.
int64_t threads_for(int64_t items) {
  return std::min(int64_t{kTapThreads}, ceil_div(items, int64_t{32}) * 32);
}

unsigned grid_of(const char* op, int64_t groups, int64_t chunks) {
  PYDENSE_CHECK(groups <= INT32_MAX / chunks, op, ": out must have less than 2^31 tiles, got ",
                groups, " x ", chunks);
  return static_cast<unsigned>(groups * chunks);
}

template <class T, bool kChannelsLast>
void launch_add(const char* op, const TapAddArgs& args, int device, void* stream) {
  const TapShifts& shape = args.shape;
  const int64_t pixels = shape.height * shape.width;
  TapAddParams<T> p{};
  p.maps = static_cast<const T*>(args.maps);
  p.pitch = args.pitch;
  p.image_step = args.pitch * (kChannelsLast ? pixels : shape.taps * shape.outputs);
  p.outputs = static_cast<int32_t>(shape.outputs);
  p.height = static_cast<int32_t>(shape.height);
  p.width = static_cast<int32_t>(shape.width);
  const int64_t items = pixels * (kChannelsLast ? shape.outputs : 1);
  PYDENSE_CHECK(items < kMost, op, ": an image must have less than 2^30 numbers at a time, got ",
                items);
  p.items = static_cast<uint32_t>(items);
  const int64_t threads = threads_for(items);
  const int64_t chunks = ceil_div(items, threads);
  p.chunks = static_cast<uint32_t>(chunks);
  p.num_biases = args.num_biases;
  for (int b = 0; b < args.num_biases; ++b) {
    p.biases[b] = static_cast<const T*>(args.biases[b]);
  }
  p.out = static_cast<T*>(args.out);
  p.strides = args.strides;
  fill_table(shape, p.table);
  const int64_t groups = shape.images * (kChannelsLast ? 1 : shape.outputs);
  const LaunchConfig config = {dim3(grid_of(op, groups, chunks)),
                               dim3(static_cast<unsigned>(threads)), 0, device, stream};
  PYDENSE_LAUNCH((tap_add_kernel<T, kChannelsLast>), config, p);
}

template <class T, bool kChannelsLast>
void launch_gather(const char* op, const TapGatherArgs& args, int device, void* stream) {
  const TapShifts& shape = args.shape;
  TapGatherParams<T> p{};
  p.grad = static_cast<const T*>(args.grad);
  p.strides = args.strides;
  p.maps = static_cast<T*>(args.maps);
  p.pitch = args.pitch;
  p.outputs = static_cast<int32_t>(shape.outputs);
  p.height = static_cast<int32_t>(shape.height);
  p.width = static_cast<int32_t>(shape.width);
  p.first = static_cast<int32_t>(args.first);
  p.count = static_cast<int32_t>(args.count);
  const int64_t lines = shape.taps * shape.outputs;
  PYDENSE_CHECK(lines < kMost, op, ": taps x outputs must be less than 2^30, got ", lines);
  p.lines = static_cast<uint32_t>(lines);
  fill_table(shape, p.table);
  const int64_t groups = ceil_div(args.count, int64_t{kGatherPixels});
  p.groups = static_cast<uint32_t>(groups);
  const int64_t threads = threads_for(kChannelsLast ? lines : groups);
  const int64_t chunks = ceil_div(kChannelsLast ? lines : groups, threads);
  p.chunks = static_cast<uint32_t>(chunks);
  const int64_t blocks = shape.images * (kChannelsLast ? groups : lines);
  const LaunchConfig config = {dim3(grid_of(op, blocks, chunks)),
                               dim3(static_cast<unsigned>(threads)), 0, device, stream};
  PYDENSE_LAUNCH((tap_gather_kernel<T, kChannelsLast>), config, p);
}

bool is_empty(const TapShifts& shape) {
  return shape.images == 0 || shape.outputs == 0 || shape.height == 0 || shape.width == 0;
}

}  // namespace

void tap_add_cuda(const char* op, FloatType dtype, const TapAddArgs& args, int device,
                  void* stream) {
  check_shifts(op, args.shape);
  PYDENSE_CHECK(args.num_biases >= 0 && args.num_biases <= kMaxTapBranches, op,
                ": biases must be at most ", kMaxTapBranches, ", got ", args.num_biases);
  if (is_empty(args.shape)) {
    return;
  }
  with_picture_type(dtype, args.channels_last, [&]<class T>(T, auto last) {
    launch_add<T, decltype(last)::value>(op, args, device, stream);
  });
}

void tap_gather_cuda(const char* op, FloatType dtype, const TapGatherArgs& args, int device,
                     void* stream) {
  check_shifts(op, args.shape);
  const int64_t pixels = args.shape.height * args.shape.width;
  PYDENSE_CHECK(args.first >= 0 && args.count >= 0 && args.first <= pixels - args.count, op,
                ": pixels must lie in [0, ", pixels, "), got ", args.count, " from ", args.first);
  if (is_empty(args.shape) || args.count == 0 || args.shape.taps == 0) {
    return;
  }
  with_picture_type(dtype, args.channels_last, [&]<class T>(T, auto last) {
    launch_gather<T, decltype(last)::value>(op, args, device, stream);
  });
}

}  // namespace pydense
