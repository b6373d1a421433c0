// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "upsample/upsample_backward_kernels.cuh"
#include "upsample/upsample_launch.cuh"

namespace pydense {
namespace {

constexpr int64_t kMaxTileColumns = 1024;
// As many blocks as an H200 holds: with fewer, pictures are cut into bands of rows, which read the
// output's rows between two of them twice.
constexpr int64_t kWantedBlocks = 1024;

template <class T>
BackwardParams<T> backward_params(const UpsampleBackwardArgs& args) {
  const UpsampleShape& shape = args.shape;
  BackwardParams<T> p{};
  p.planes = shape.batches * (shape.channels_last ? 1 : shape.channels);
  p.channels = shape.channels;
  p.height = shape.height;
  p.width = shape.width;
  p.grad = static_cast<const T*>(args.grad);
  p.grad_strides = args.grad_strides;
  p.out = static_cast<const T*>(args.out);
  return p;
}

// Whether vectors of the output's gradient can be moved; `dense` is as large, or null.
bool can_move_vectors(const UpsampleBackwardArgs& args, const void* dense, size_t element,
                      int vector) {
  const UpsampleShape& shape = args.shape;
  const auto aligned = [&](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % (element * static_cast<size_t>(vector)) == 0;
  };
  return (shape.channels_last ? shape.channels : shape.width) % vector == 0 && aligned(args.out) &&
         aligned(dense) && rows_are_aligned(shape, args.grad, args.grad_strides, element, vector);
}

// Columns of the output that so many neighbours of the input touch, at most; more where float
// coordinates are too coarse to say.
template <class T>
int64_t columns_needed(const AxisMap<T>& map, int64_t columns) {
  constexpr int64_t kExact = 1 << 20;
  if (map.in_size > kExact || map.out_size > kExact) {
    return map.out_size;
  }
  // Where one output is spread over a whole input, step is 0.
  const double scale = map.grid == AxisGrid::kCrop ? static_cast<double>(map.stride)
                                                   : 1.0 / static_cast<double>(map.step);
  const double needed = static_cast<double>(columns + 1) * scale + 4;
  return needed < static_cast<double>(map.out_size) ? static_cast<int64_t>(needed) : map.out_size;
}

template <class T, int kVector, bool kChannelsLast>
void launch_backward(BackwardParams<T> p, int device, void* stream) {
  using A = Accumulate<T>;
  constexpr int64_t kElements = kBackwardElements<T>;
  // Channels of a pixel that lie together, up to 64 bytes, or 32 where many columns are needed.
  const double scale = static_cast<double>(p.x.out_size) / static_cast<double>(p.x.in_size);
  const int64_t most = std::max<int64_t>((scale < 8 ? 64 : 32) / static_cast<int64_t>(sizeof(T)),
                                         kVector > 1 ? 16 / static_cast<int64_t>(sizeof(A)) : 1);
  const int64_t parts = kChannelsLast ? ceil_div(p.channels, most) : 1;
  p.part_channels = static_cast<int32_t>(
      kChannelsLast ? ceil_div(ceil_div(p.channels, kVector), parts) * kVector : 1);
  const int64_t row = p.width * p.part_channels;
  const int64_t x =
      std::min<int64_t>(ceil_div(ceil_div(row, kElements), 32) * 32, kBackwardThreads);
  const int64_t y = std::min(kBackwardThreads / x, p.planes);
  const int64_t elements = x * kElements;
  const int64_t columns = elements / p.part_channels;
  // A vector more on each side: the first column is rounded down.
  const auto fits = [&](int64_t tile) { return columns_needed(p.x, tile) + kVector <= columns; };
  int64_t tile = std::min(p.x.in_size, kMaxTileColumns);
  while (tile > 1 && !fits(tile)) {
    tile = tile / 2;
  }
  while (tile < std::min(p.x.in_size, kMaxTileColumns) && fits(tile + 1)) {
    ++tile;
  }
  const int64_t tiles_x = ceil_div(p.x.in_size, tile);
  p.tile_columns = static_cast<int32_t>(ceil_div(p.x.in_size, tiles_x));
  const int64_t groups = std::min(ceil_div(p.planes, y), kMaxGridY);
  const int64_t bands =
      std::clamp<int64_t>(kWantedBlocks / (tiles_x * parts * groups), 1, p.y.in_size);
  const int64_t blocks = tiles_x * parts * bands;
  PYDENSE_CHECK(blocks <= INT32_MAX, "upsampling: a picture must have less than 2^31 tiles, got ",
                blocks);
  p.tiles_x = static_cast<uint32_t>(tiles_x);
  p.bands = static_cast<uint32_t>(bands);
  const int64_t rows = std::min(groups, std::max<int64_t>(kEnoughBlocks / blocks, 1));
  const int64_t bytes = BackwardTile<A>::bytes(y, elements, columns, p.tile_columns,
                                               int64_t{p.tile_columns} * p.part_channels);
  const LaunchConfig config = {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows)),
                               dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
                               static_cast<size_t>(bytes), device, stream};
  PYDENSE_LAUNCH((upsample_backward_kernel<T, kVector, kChannelsLast>), config, p);
}

template <class T, int kVector, bool kChannelsLast>
void launch_mask(BackwardParams<T> p, int device, void* stream) {
  const int64_t vectors = ceil_div(p.width * (kChannelsLast ? p.channels : 1), kVector);
  const unsigned x = std::max(covering_power(vectors, kBackwardThreads), 32U);
  const unsigned y = covering_power(ceil_div(p.height, kRowsAhead), kBackwardThreads / x);
  const int64_t tiles_x = ceil_div(vectors, int64_t{x});
  const int64_t tiles = tiles_x * ceil_div(p.height, int64_t{y} * kRowsAhead);
  PYDENSE_CHECK(tiles <= INT32_MAX, "upsampling: a picture must have less than 2^31 tiles, got ",
                tiles);
  p.tiles_x = static_cast<uint32_t>(tiles_x);
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min(p.planes, kMaxGridY))),
      dim3(x, y), 0, device, stream};
  PYDENSE_LAUNCH((upsample_mask_kernel<T, kVector, kChannelsLast>), config, p);
}

template <class T, bool kChannelsLast>
void launch_all(UpsampleBackwardArgs args, int device, void* stream) {
  constexpr int kVector = kBackwardElements<T>;
  for (int k = 0; k < args.num_inputs; ++k) {
    if (!args.inputs[k].same_size) {
      continue;
    }
    BackwardParams<T> p = backward_params<T>(args);
    p.to = static_cast<T*>(args.inputs[k].data);
    if (can_move_vectors(args, p.to, sizeof(T), kVector)) {
      launch_mask<T, kVector, kChannelsLast>(p, device, stream);
    } else {
      launch_mask<T, 1, kChannelsLast>(p, device, stream);
    }
    // What the others gather from: one tensor to read instead of two.
    const int64_t channels = args.shape.channels;
    const int64_t width = args.shape.width;
    const int64_t plane = args.shape.height * width;
    args.grad = p.to;
    args.grad_strides = {channels * plane, kChannelsLast ? 1 : plane,
                         kChannelsLast ? width * channels : width};
    args.out = nullptr;
  }
  for (int k = 0; k < args.num_inputs; ++k) {
    const UpsampleInput& input = args.inputs[k];
    if (input.same_size) {
      continue;
    }
    BackwardParams<T> p = backward_params<T>(args);
    p.to = static_cast<T*>(input.data);
    p.y = axis_map<Accumulate<T>>(input.y);
    p.x = axis_map<Accumulate<T>>(input.x);
    if (can_move_vectors(args, nullptr, sizeof(T), kVector)) {
      launch_backward<T, kVector, kChannelsLast>(p, device, stream);
    } else {
      launch_backward<T, 1, kChannelsLast>(p, device, stream);
    }
  }
}

}  // namespace

void upsample_backward_cuda(const char* op, FloatType dtype, const UpsampleBackwardArgs& args,
                            int device, void* stream) {
  check_upsample(op, args.shape, args.inputs, args.num_inputs);
  if (args.shape.batches == 0 || args.shape.channels == 0) {
    return;
  }
  with_picture_type(dtype, args.shape.channels_last, [&]<class T>(T, auto channels_last) {
    launch_all<T, decltype(channels_last)::value>(args, device, stream);
  });
}

}  // namespace pydense
