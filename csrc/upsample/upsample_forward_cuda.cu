// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "upsample/upsample_forward_kernels.cuh"
#include "upsample/upsample_launch.cuh"

namespace pydense {
namespace {

template <class T>
ForwardParams<T> forward_params(const UpsampleArgs& args) {
  const UpsampleShape& shape = args.shape;
  ForwardParams<T> p{};
  p.planes = shape.batches * (shape.channels_last ? 1 : shape.channels);
  p.channels = shape.channels;
  p.height = shape.height;
  p.row = shape.width * (shape.channels_last ? shape.channels : 1);
  p.relu = args.relu;
  p.out = static_cast<T*>(args.out);
  for (const bool same : {true, false}) {
    for (int k = 0; k < args.num_inputs; ++k) {
      const UpsampleInput& from = args.inputs[k];
      if (from.same_size == same) {
        ForwardInput<T>& to = p.inputs[p.num_inputs++];
        to.data = static_cast<const T*>(from.data);
        to.strides = from.strides;
        if (!same) {
          to.y = axis_map<Accumulate<T>>(from.y);
          to.x = axis_map<Accumulate<T>>(from.x);
        }
      }
    }
    p.num_same = same ? p.num_inputs : p.num_same;
  }
  return p;
}

// Whether vectors of so many elements can be moved: all outputs, inputs of the same size, and for
// channels_last those of every input.
bool can_move_vectors(const UpsampleArgs& args, size_t element, int vector) {
  const UpsampleShape& shape = args.shape;
  const bool last = shape.channels_last;
  bool can = (last ? shape.channels : shape.width) % vector == 0 &&
             reinterpret_cast<uintptr_t>(args.out) % (element * static_cast<size_t>(vector)) == 0;
  for (int k = 0; k < args.num_inputs; ++k) {
    const UpsampleInput& input = args.inputs[k];
    can = can && ((!input.same_size && !last) ||
                  rows_are_aligned(shape, input.data, input.strides, element, vector));
  }
  return can;
}

// Rows of an input that so many neighbouring rows of the output need, at most.
template <class T>
int64_t rows_needed(const AxisMap<T>& map, int64_t rows) {
  constexpr int64_t kExact = 1 << 20;  // coordinates in float are off by less than 1/2
  const double step = map.grid == AxisGrid::kCrop ? 1.0 / static_cast<double>(map.stride)
                                                  : static_cast<double>(map.step);
  const double span = step * static_cast<double>(rows - 1) + 0.5;
  return map.in_size <= kExact && span < static_cast<double>(2 * rows - 3)
             ? std::min(static_cast<int64_t>(span) + 3, 2 * rows)
             : 2 * rows;
}

template <class T, int kVector, bool kChannelsLast>
void launch_forward(const UpsampleArgs& args, int device, void* stream) {
  using A = Accumulate<T>;
  constexpr int kElements = kForwardElements<T>;
  ForwardParams<T> p = forward_params<T>(args);
  const unsigned x = covering_power(ceil_div(p.row, kElements), 32);
  const unsigned y = covering_power(ceil_div(p.height, kForwardRows), kForwardThreads / x);
  const unsigned z = covering_power(p.planes, std::min(kForwardThreads / (x * y), 64U));
  const int64_t length = int64_t{x} * kElements;
  const int64_t rows = int64_t{y} * kForwardRows;
  const int64_t tiles_x = ceil_div(p.row, length);
  const int64_t tiles = tiles_x * ceil_div(p.height, rows);
  PYDENSE_CHECK(tiles <= INT32_MAX, "upsampling: a picture must have less than 2^31 tiles, got ",
                tiles);
  p.tiles_x = static_cast<uint32_t>(tiles_x);
  for (int k = p.num_same; k < p.num_inputs; ++k) {
    p.staged_rows =
        static_cast<int32_t>(std::max<int64_t>(p.staged_rows, rows_needed(p.inputs[k].y, rows)));
  }
  const int64_t groups = std::min(
      {ceil_div(p.planes, int64_t{z}), std::max<int64_t>(kEnoughBlocks / tiles, 1), kMaxGridY});
  using Offset = std::conditional_t<kChannelsLast, int64_t, int32_t>;
  const int64_t bytes =
      int64_t{z} * p.staged_rows * length * static_cast<int64_t>(sizeof(A)) +
      (p.num_inputs - p.num_same) *
          ForwardTable<A, Offset>::bytes(static_cast<int>(length / (kChannelsLast ? kVector : 1)),
                                         static_cast<int>(rows), p.staged_rows);
  const LaunchConfig config = {dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(groups)),
                               dim3(x, y, z), static_cast<size_t>(bytes), device, stream};
  PYDENSE_LAUNCH((upsample_forward_kernel<T, kVector, kChannelsLast>), config, p);
}

template <class T, bool kChannelsLast>
void launch_forward_of(const UpsampleArgs& args, int device, void* stream) {
  constexpr int kVector = kForwardElements<T>;
  if (can_move_vectors(args, sizeof(T), kVector)) {
    launch_forward<T, kVector, kChannelsLast>(args, device, stream);
  } else {
    launch_forward<T, 1, kChannelsLast>(args, device, stream);
  }
}

}  // namespace

void upsample_forward_cuda(const char* op, FloatType dtype, const UpsampleArgs& args, int device,
                           void* stream) {
  check_upsample(op, args.shape, args.inputs, args.num_inputs);
  if (args.shape.batches == 0 || args.shape.channels == 0) {
    return;
  }
  with_picture_type(dtype, args.shape.channels_last, [&]<class T>(T, auto channels_last) {
    launch_forward_of<T, decltype(channels_last)::value>(args, device, stream);
  });
}

}  // namespace pydense
