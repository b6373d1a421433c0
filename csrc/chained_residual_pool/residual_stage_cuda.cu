// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "chained_residual_pool/max_pool_launch.cuh"
#include "chained_residual_pool/residual_fma_kernels.cuh"
#include "chained_residual_pool/residual_mma_kernels.cuh"

namespace pydense {
namespace {

template <class T>
bool is_aligned(const void* data) {
  return pool_is_aligned(data, sizeof(T), kResidualVector<T>);
}

// Where pooled and offsets are null too.
template <class T>
bool results_are_aligned(const ResidualStageArgs& args) {
  bool aligned = is_aligned<T>(args.out) && is_aligned<T>(args.pooled) &&
                 pool_is_aligned(args.offsets, 1, kResidualVector<T>);
  for (int k = 0; k < args.num_addends; ++k) {
    aligned = aligned && is_aligned<T>(args.addends[k].data);
  }
  return aligned;
}

// Channels of a block: all, in even parts where they are more than `most`; fewer where pixels alone
// make too few blocks. A multiple of `step`.
int64_t channels_of_block(int64_t channels, int64_t pixel_tiles, int64_t step, int64_t most) {
  const auto even_part = [&](int64_t part) {
    return ceil_div(ceil_div(channels, ceil_div(channels, part)), step) * step;
  };
  int64_t tile = even_part(most);
  while (tile > step && pixel_tiles * ceil_div(channels, tile) < kMultiprocessors) {
    tile = even_part(ceil_div(tile / 2, step) * step);
  }
  return tile;
}

template <class T, bool kChannelsLast, int kSize>
void launch_stage(const ResidualStageArgs& args, int device, void* stream) {
  constexpr bool kTensorCores = sizeof(T) == 2;
  constexpr int kVector = kResidualVector<T>;
  constexpr int kMinThreads = kTensorCores ? kMmaMinThreads : kFmaMinThreads;
  constexpr int kMaxThreads = kTensorCores ? kMmaThreads : kFmaThreads;
  int64_t rows = kMmaRows;
  int64_t most = kMmaChannels;
  if constexpr (!kTensorCores) {
    rows = kFmaRows<T>;
    most = kFmaChannels<T>;
  }
  PoolShape shape = args.shape;
  if (kSize == 1 && shape.height * shape.width % kResidualColumns == 0) {
    // Pixels have no neighbours then: as they lie in memory.
    shape.height = shape.height * shape.width / kResidualColumns;
    shape.width = kResidualColumns;
  }
  constexpr int64_t kMostSize = INT32_MAX - 64;  // and what a tile has beyond
  PYDENSE_CHECK(
      shape.channels <= kMostSize && shape.height <= kMostSize && shape.width <= kMostSize,
      "chained_residual_pool: x must have less than 2^31 - 64 channels, rows and columns, got ",
      shape.channels, ", ", shape.height, " and ", shape.width);
  ResidualStageParams<T> p{};
  p.x = static_cast<const T*>(args.x.data);
  p.height = static_cast<int32_t>(shape.height);
  p.width = static_cast<int32_t>(shape.width);
  p.depth = static_cast<int32_t>(shape.channels);
  p.weight = static_cast<const T*>(args.weight);
  p.bias = static_cast<const T*>(args.bias);
  p.out = static_cast<T*>(args.out);
  p.pooled = static_cast<T*>(args.pooled);
  p.offsets = args.offsets;
  p.num_addends = args.num_addends;
  for (int k = 0; k < args.num_addends; ++k) {
    p.addends[k] = static_cast<const T*>(args.addends[k].data);
  }
  const bool vectors = (kChannelsLast ? shape.channels : shape.width) % kVector == 0;
  p.x_vectors = vectors && is_aligned<T>(p.x);
  p.weight_vectors = shape.channels % kVector == 0 && is_aligned<T>(p.weight);
  p.result_vectors = vectors && results_are_aligned<T>(args);

  const int64_t across = ceil_div(shape.width, int64_t{kResidualColumns});
  const int64_t down = ceil_div(shape.height, rows);
  const int64_t pixel_tiles = across * down * shape.batches;
  const int64_t step = most / (kMaxThreads / kMinThreads);
  const int64_t tile = channels_of_block(shape.channels, pixel_tiles, step, most);
  const int64_t channel_tiles = ceil_div(shape.channels, tile);
  const int64_t blocks = pixel_tiles * channel_tiles;
  PYDENSE_CHECK(blocks <= INT32_MAX,
                "chained_residual_pool: x must have less than 2^31 tiles, got ", blocks);
  p.tiles_across = static_cast<uint32_t>(across);
  p.tiles_down = static_cast<uint32_t>(down);
  p.channel_tiles = static_cast<uint32_t>(channel_tiles);
  p.tile_channels = static_cast<int32_t>(tile);
  const auto grid = dim3(static_cast<unsigned>(blocks));
  const auto threads = static_cast<int>(tile / step) * kMinThreads;
  if constexpr (kTensorCores) {
    const auto launch = [&](auto offsets) {
      constexpr bool kOffsets = decltype(offsets)::value;
      const int bytes = ResidualMma<T, kChannelsLast, kSize, kOffsets>::bytes(threads);
      PYDENSE_LAUNCH((residual_mma_kernel<T, kChannelsLast, kSize, kOffsets>),
                     (LaunchConfig{grid, dim3(static_cast<unsigned>(threads)),
                                   static_cast<size_t>(bytes), device, stream}),
                     p);
    };
    // Windows of 5 x 5 have a kernel without offsets too.
    if constexpr (kSize == 5) {
      if (args.offsets == nullptr) {
        return launch(std::false_type{});
      }
    }
    launch(std::bool_constant<(kSize > 1)>{});
  } else {
    PYDENSE_LAUNCH((residual_fma_kernel<T, kChannelsLast, kSize>),
                   (LaunchConfig{grid, dim3(static_cast<unsigned>(threads)), 0, device, stream}),
                   p);
  }
}

template <class T, int kVector>
void launch_sum(const ResidualSumArgs& args, int64_t elements, int device, void* stream) {
  constexpr int64_t kMostBlocks = int64_t{1} << 16;
  ResidualSumParams<T> p{};
  p.vectors = elements / kVector;
  p.num_addends = args.num_addends;
  for (int k = 0; k < args.num_addends; ++k) {
    p.addends[k] = static_cast<const T*>(args.addends[k].data);
  }
  p.out = static_cast<T*>(args.out);
  const int64_t blocks = std::min(ceil_div(p.vectors, int64_t{kSumThreads}), kMostBlocks);
  const LaunchConfig config = {dim3(static_cast<unsigned>(blocks)), dim3(kSumThreads), 0, device,
                               stream};
  PYDENSE_LAUNCH((residual_sum_kernel<T, kVector>), config, p);
}

}  // namespace

void residual_stage_cuda(const char* op, FloatType dtype, const ResidualStageArgs& args, int device,
                         void* stream) {
  PYDENSE_CHECK(args.num_addends >= 0 && args.num_addends <= kMaxResidualStages, op,
                ": weights must be at most ", kMaxResidualStages, ", got ", args.num_addends);
  if (is_empty(args.shape)) {
    return;
  }
  if (!residual_stage_cuda_fuses(args.shape)) {
    PYDENSE_CHECK(args.pooled != nullptr, op, ": pooled must be given for windows above 5 x 5");
    max_pool_forward_cuda(op, dtype, {args.shape, args.x, args.pooled, args.offsets}, device,
                          stream);
    ResidualStageArgs product = args;
    product.shape.size = 1;
    product.x.data = args.pooled;
    product.pooled = nullptr;
    product.offsets = nullptr;
    return residual_stage_cuda(op, dtype, product, device, stream);
  }
  with_picture_type(dtype, args.shape.channels_last, [&]<class T>(T, auto channels_last) {
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    switch (args.shape.size) {
      case 1:
        return launch_stage<T, kChannelsLast, 1>(args, device, stream);
      case 3:
        return launch_stage<T, kChannelsLast, 3>(args, device, stream);
      default:
        return launch_stage<T, kChannelsLast, 5>(args, device, stream);
    }
  });
}

void residual_sum_cuda(FloatType dtype, const ResidualSumArgs& args, int device, void* stream) {
  const PoolShape& shape = args.shape;
  if (is_empty(shape)) {
    return;
  }
  const int64_t elements = shape.batches * shape.channels * shape.height * shape.width;
  with_picture_type(dtype, false, [&]<class T>(T, auto) {
    bool vectors = elements % kResidualVector<T> == 0 && is_aligned<T>(args.out);
    for (int k = 0; k < args.num_addends; ++k) {
      vectors = vectors && is_aligned<T>(args.addends[k].data);
    }
    if (vectors) {
      launch_sum<T, kResidualVector<T>>(args, elements, device, stream);
    } else {
      launch_sum<T, 1>(args, elements, device, stream);
    }
  });
}

}  // namespace pydense
