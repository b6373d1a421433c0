// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "chained_residual_pool/max_pool_backward_kernels.cuh"
#include "chained_residual_pool/max_pool_launch.cuh"

namespace pydense {
namespace {

constexpr int64_t kMaxTileVectors = 256;
// Channels of a pixel that lie together: 32 bytes of offsets, and more of the gradient.
constexpr int64_t kPartChannels = 32;
constexpr int64_t kMaxPartVectors = 16;

template <class T, int kVector, bool kAlong>
void launch_backward(const MaxPoolBackwardArgs& args, int device, void* stream) {
  const PoolShape& shape = args.shape;
  const int64_t planes = shape.batches * (shape.channels_last ? 1 : shape.channels);
  const int64_t reach = shape.size / 2;
  PoolBackwardParams<T> p{};
  p.unit = pool_unit(shape);
  p.channels = shape.channels_last ? 1 : shape.channels;
  p.height = shape.height;
  p.width = shape.width;
  p.size = shape.size;
  p.groups_of_plane = static_cast<int32_t>(ceil_div(shape.height, kPoolBackwardRows));
  p.groups = planes * p.groups_of_plane;
  const int64_t parts =
      kAlong ? 1 : ceil_div(p.unit, std::min(kPartChannels, kMaxPartVectors * kVector));
  p.parts = static_cast<uint32_t>(parts);
  p.part_channels =
      kAlong ? 1 : static_cast<int32_t>(ceil_div(ceil_div(p.unit, kVector), parts) * kVector);
  // In vectors that lie side by side in a block.
  const int64_t step = kAlong ? kVector : 1;                       // pixels of one
  const int64_t vectors = kAlong ? 1 : p.part_channels / kVector;  // of a pixel
  const int64_t steps = ceil_div(shape.width, step);
  const int64_t most = kMaxTileVectors / vectors;
  const int64_t halo = steps <= most ? 0 : ceil_div(reach, step);
  const int64_t tiles = ceil_div(steps, most - 2 * halo);
  const int64_t tile = ceil_div(steps, tiles);
  p.tile_columns = static_cast<int32_t>(tile * step);
  p.halo_columns = static_cast<int32_t>(halo * step);
  const int64_t x = (tile + 2 * halo) * vectors;
  const int64_t y = std::clamp<int64_t>(kPoolBackwardThreads / x, 1, p.groups);
  const int64_t blocks = tiles * parts * ceil_div(p.groups, y);
  PYDENSE_CHECK(blocks <= INT32_MAX, "max pooling: grad must have less than 2^31 tiles, got ",
                blocks);
  p.tiles = static_cast<uint32_t>(tiles * parts);
  p.grad = static_cast<const T*>(args.grad.data);
  p.batch_stride = args.grad.batch;
  p.channel_stride = args.grad.channel;
  p.row_stride = args.grad.row;
  p.offsets = args.offsets;
  p.addend = static_cast<const T*>(args.addend);
  p.result = static_cast<T*>(args.result);
  const int64_t elements = x * y * kPoolBackwardRows * kVector;
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
      static_cast<size_t>(elements) * (sizeof(Accumulate<T>) + 1), device, stream};
  with_pool_size(shape.size, [&](auto size) {
    PYDENSE_LAUNCH((max_pool_backward_kernel<T, kVector, kAlong, decltype(size)::value>), config,
                   p);
  });
}

}  // namespace

void max_pool_backward_cuda(const char* op, FloatType dtype, const MaxPoolBackwardArgs& args,
                            int device, void* stream) {
  const PoolShape& shape = args.shape;
  check_pool_shape(op, shape);
  if (shape.batches == 0 || shape.channels == 0) {
    return;
  }
  PYDENSE_CHECK(shape.height < INT32_MAX - kMaxPoolSize, op,
                ": grad must have less than 2^31 - 13 rows, got ", shape.height);
  with_picture_type(dtype, shape.channels_last, [&]<class T>(T, auto channels_last) {
    constexpr int kVector = kPoolBackwardElements<T>;
    if (pool_rows_are_aligned(shape, args.grad, sizeof(T), kVector) &&
        pool_is_aligned(args.offsets, 1, kVector) &&
        pool_is_aligned(args.addend, sizeof(T), kVector) &&
        pool_is_aligned(args.result, sizeof(T), kVector)) {
      launch_backward<T, kVector, !decltype(channels_last)::value>(args, device, stream);
    } else {
      launch_backward<T, 1, false>(args, device, stream);
    }
  });
}

}  // namespace pydense
