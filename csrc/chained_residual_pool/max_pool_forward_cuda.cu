// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "chained_residual_pool/max_pool_forward_kernels.cuh"
#include "chained_residual_pool/max_pool_launch.cuh"

namespace pydense {
namespace {

// As many threads as keep the GPU busy. With fewer, pictures are cut into bands of rows, which
// reduce the rows around them again.
constexpr int64_t kWantedThreads = kMultiprocessors * 2048;
constexpr int64_t kMinBand = 8;

template <class T, int kVector, bool kAlong, int kSize>
void launch_forward(const MaxPoolArgs& args, int device, void* stream) {
  const PoolShape& shape = args.shape;
  const int64_t planes = shape.batches * (shape.channels_last ? 1 : shape.channels);
  PoolForwardParams<T> p{};
  p.unit = pool_unit(shape);
  p.row = shape.width * p.unit;
  p.columns = p.row / kVector;
  p.channels = shape.channels_last ? 1 : shape.channels;
  p.height = shape.height;
  p.size = shape.size;
  const int64_t bands = std::clamp<int64_t>(ceil_div(kWantedThreads, planes * p.columns), 1,
                                            ceil_div(shape.height, kMinBand));
  p.band = static_cast<int32_t>(ceil_div(ceil_div(shape.height, bands), 2) * 2);
  p.bands = static_cast<int32_t>(ceil_div(shape.height, int64_t{p.band}));
  p.threads = planes * p.bands * p.columns;
  p.slots = 4;
  while (p.slots <= shape.size) {
    p.slots *= 2;
  }
  p.x = static_cast<const T*>(args.x.data);
  p.batch_stride = args.x.batch;
  p.channel_stride = args.x.channel;
  p.row_stride = args.x.row;
  p.out = static_cast<T*>(args.out);
  p.offsets = args.offsets;
  const int64_t blocks = ceil_div(p.threads, int64_t{kPoolThreads});
  PYDENSE_CHECK(blocks <= INT32_MAX, "max pooling: x must have less than 2^38 elements");
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(blocks)), dim3(kPoolThreads),
      static_cast<size_t>(p.slots) * kPoolThreads * kPoolSlotBytes<T, kVector>, device, stream};
  if (args.offsets != nullptr) {
    PYDENSE_LAUNCH((max_pool_forward_kernel<T, kVector, kAlong, kSize, true>), config, p);
  } else {
    PYDENSE_LAUNCH((max_pool_forward_kernel<T, kVector, kAlong, kSize, false>), config, p);
  }
}

}  // namespace

void max_pool_forward_cuda(const char* op, FloatType dtype, const MaxPoolArgs& args, int device,
                           void* stream) {
  const PoolShape& shape = args.shape;
  check_pool_shape(op, shape);
  if (shape.batches == 0 || shape.channels == 0) {
    return;
  }
  PYDENSE_CHECK(shape.height < INT32_MAX - kMinBand, op,
                ": x must have less than 2^31 - 8 rows, got ", shape.height);
  with_picture_type(dtype, shape.channels_last, [&]<class T>(T, auto channels_last) {
    constexpr int kVector = 16 / sizeof(T);
    constexpr bool kAlong = !decltype(channels_last)::value;
    const bool aligned = pool_rows_are_aligned(shape, args.x, sizeof(T), kVector) &&
                         pool_is_aligned(args.out, sizeof(T), kVector) &&
                         pool_is_aligned(args.offsets, 1, kVector);
    with_pool_size(shape.size, [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      if constexpr (!kAlong || kSize > 0) {
        if (aligned) {
          return launch_forward<T, kVector, kAlong, kSize>(args, device, stream);
        }
      }
      launch_forward<T, 1, false, kSize>(args, device, stream);
    });
  });
}

}  // namespace pydense
