// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "chained_residual_pool/max_pool_launch.cuh"
#include "chained_residual_pool/residual_fma_kernels.cuh"
#include "chained_residual_pool/residual_mma_kernels.cuh"

namespace pydense {
namespace {

bool is_empty(const PoolShape& shape) { return shape.batches == 0 || shape.channels == 0; }

template <class T>
bool is_aligned(const void* data) {
  return pool_is_aligned(data, sizeof(T), kResidualVector<T>);
}

template <class T, bool kChannelsLast>
void launch_product(const ResidualStageArgs& args, const void* operand, int device, void* stream) {
  constexpr bool kTensorCores = sizeof(T) == 2;
  constexpr int kVector = kResidualVector<T>;
  const PoolShape& shape = args.shape;
  const int64_t pixels = shape.height * shape.width;
  ResidualProductParams<T> p{};
  PYDENSE_CHECK(shape.channels <= INT32_MAX - kMmaDepth,
                "chained_residual_pool: x must have less than 2^31 - 32 channels, got ",
                shape.channels);
  p.depth = static_cast<int32_t>(shape.channels);
  p.rows = kChannelsLast ? shape.batches * pixels : shape.channels;
  p.columns = kChannelsLast ? shape.channels : pixels;
  p.left = static_cast<const T*>(kChannelsLast ? operand : args.weight);
  p.right = static_cast<const T*>(kChannelsLast ? args.weight : operand);
  p.bias = static_cast<const T*>(args.bias);
  p.out = static_cast<T*>(args.out);
  p.num_addends = args.num_addends;
  const bool vectors = p.columns % kVector == 0;
  p.result_vectors = vectors && is_aligned<T>(p.out);
  for (int k = 0; k < args.num_addends; ++k) {
    p.addends[k] = static_cast<const T*>(args.addends[k].data);
    p.result_vectors = p.result_vectors && is_aligned<T>(p.addends[k]);
  }
  p.operand_vectors =
      vectors && p.depth % kVector == 0 && is_aligned<T>(p.left) && is_aligned<T>(p.right);

  int64_t tile = kMmaTile;
  if constexpr (!kTensorCores) {
    tile = kFmaTile<T>;
  }
  const int64_t row_tiles = ceil_div(p.rows, tile);
  p.column_tiles = ceil_div(p.columns, tile);
  p.channel_tiles = static_cast<uint32_t>(kChannelsLast ? p.column_tiles : row_tiles);
  const int64_t blocks = row_tiles * p.column_tiles * (kChannelsLast ? 1 : shape.batches);
  PYDENSE_CHECK(blocks <= INT32_MAX,
                "chained_residual_pool: x must have less than 2^31 tiles, got ", blocks);
  const auto grid = dim3(static_cast<unsigned>(blocks));
  if constexpr (kTensorCores) {
    PYDENSE_LAUNCH((residual_mma_kernel<T, kChannelsLast>),
                   (LaunchConfig{grid, dim3(kMmaThreads), kMmaSharedBytes, device, stream}), p);
  } else {
    PYDENSE_LAUNCH((residual_fma_kernel<T, kChannelsLast>),
                   (LaunchConfig{grid, dim3(kFmaThreads), 0, device, stream}), p);
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
  const void* operand = args.x.data;
  if (args.shape.size != 1) {
    max_pool_forward_cuda(op, dtype, {args.shape, args.x, args.pooled, args.offsets}, device,
                          stream);
    operand = args.pooled;
  }
  with_picture_type(dtype, args.shape.channels_last, [&]<class T>(T, auto channels_last) {
    launch_product<T, decltype(channels_last)::value>(args, operand, device, stream);
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
