// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/dense_cuda.h"
#include "atrous_conv/dense_gradient_mma_kernels.cuh"
#include "atrous_conv/dense_layout.cuh"

namespace pydense {
namespace {

constexpr int kManyWarps = 8;
constexpr int kFewWarps = 4;  // where no more channels are there
constexpr int64_t kMostSplits = 64;
constexpr int64_t kLeastSteps = 8;  // of a part

// What a call needs of memory, and where: operands in their order, then the parts.
template <class T>
struct Plan {
  int warps;
  int64_t outputs;  // with those that fill vectors
  int64_t channels;
  int64_t output_tiles;
  int64_t channel_tiles;
  int64_t splits;
  int64_t items;
  int64_t bytes = 0;
  int64_t grad = -1;  // or it is read where it is
  int64_t x = -1;
  int64_t parts = 0;

  Plan(const char* op, const DenseConvGradientArgs& args) {
    const DenseConvShape& s = args.shape;
    dense_conv_check(op, s);
    outputs = dense_vector_channels<T>(s.outputs);
    channels = dense_vector_channels<T>(s.channels);
    constexpr int64_t kMostSize = INT32_MAX - 256;
    PYDENSE_CHECK(outputs <= kMostSize && channels <= kMostSize && s.batches <= kMostSize, op,
                  ": x must have less than 2^31 - 256 images, channels and outputs on CUDA, got ",
                  s.batches, ", ", s.channels, " and ", s.outputs);
    const int64_t images = std::max<int64_t>(s.batches, 1);
    PYDENSE_CHECK(s.out_height * s.out_width <= kMostSize / images, op,
                  ": grad must have less than 2^31 - 256 pixels on CUDA, got ", s.batches, " x ",
                  s.out_height, " x ", s.out_width);
    warps = channels > kFewWarps * kDenseColumns ? kManyWarps : kFewWarps;
    output_tiles = ceil_div(outputs, int64_t{kDenseRows});
    channel_tiles = ceil_div(channels, int64_t{warps * kDenseColumns});
    const int64_t tiles = s.taps() * output_tiles * channel_tiles;
    // Twice as many blocks as the card runs at once, where pixels are many enough.
    const int64_t steps = ceil_div(s.batches * s.out_height * s.out_width, int64_t{kDenseDepth<T>});
    splits = tiles >= kMultiprocessors
                 ? 1
                 : std::clamp<int64_t>(ceil_div(2 * kMultiprocessors, tiles), 1,
                                       std::min(kMostSplits, steps / kLeastSteps + 1));
    items = tiles * splits;
    PYDENSE_CHECK(items <= INT32_MAX, op, ": weight must have less than 2^31 tiles, got ", items);
    const auto piece = [&](int64_t elements, int64_t size) {
      const int64_t at = bytes;
      bytes += ceil_div(elements * size, int64_t{256}) * 256;
      return at;
    };
    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
    if (s.batches > 0 && !dense_reads_in_place<T>(args.grad, out_shape(s), s.outputs)) {
      grad = piece(s.batches * s.out_height * s.out_width * outputs, kSize);
    }
    if (s.batches > 0 && !dense_reads_in_place<T>(args.x, s, s.channels)) {
      x = piece(s.batches * s.height * s.width * channels, kSize);
    }
    parts = piece(splits * s.taps() * outputs * channels, 4);
  }

  static DenseConvShape out_shape(DenseConvShape s) {
    s.height = s.out_height;
    s.width = s.out_width;
    return s;
  }
};

template <class T>
void run(const char* op, const DenseConvGradientArgs& args, void* workspace, int device,
         void* stream) {
  const Plan<T> plan(op, args);
  const DenseConvShape& s = args.shape;
  auto* const memory = static_cast<char*>(workspace);
  DenseGradientParams<T> p = {};
  p.grad = static_cast<const T*>(args.grad.data);
  p.grad_batch = args.grad.batch;
  p.grad_row = args.grad.row;
  p.grad_pixel = args.grad.pixel;
  if (plan.grad >= 0) {
    T* const to = reinterpret_cast<T*>(memory + plan.grad);
    lay_out_dense_pixels<T>(args.grad, s.batches, s.outputs, s.out_height, s.out_width, to, device,
                            stream);
    p.grad = to;
    p.grad_pixel = plan.outputs;
    p.grad_row = s.out_width * plan.outputs;
    p.grad_batch = s.out_height * p.grad_row;
  }
  p.x = static_cast<const T*>(args.x.data);
  p.x_batch = args.x.batch;
  p.x_row = args.x.row;
  p.x_pixel = args.x.pixel;
  if (plan.x >= 0) {
    T* const to = reinterpret_cast<T*>(memory + plan.x);
    lay_out_dense_pixels<T>(args.x, s.batches, s.channels, s.height, s.width, to, device, stream);
    p.x = to;
    p.x_pixel = plan.channels;
    p.x_row = s.width * plan.channels;
    p.x_batch = s.height * p.x_row;
  }
  p.batches = static_cast<int32_t>(s.batches);
  p.outputs = static_cast<int32_t>(plan.outputs);
  p.channels = static_cast<int32_t>(plan.channels);
  p.height = static_cast<int32_t>(s.height);
  p.width = static_cast<int32_t>(s.width);
  p.out_height = static_cast<int32_t>(s.out_height);
  p.out_width = static_cast<int32_t>(s.out_width);
  p.taps = static_cast<int32_t>(s.taps());
  p.kernel_width = static_cast<int32_t>(s.kernel_width);
  p.dilation_y = static_cast<int32_t>(s.dilation_y);
  p.dilation_x = static_cast<int32_t>(s.dilation_x);
  p.top = static_cast<int32_t>(s.top);
  p.left = static_cast<int32_t>(s.left);
  p.output_tiles = static_cast<uint32_t>(plan.output_tiles);
  p.channel_tiles = static_cast<uint32_t>(plan.channel_tiles);
  p.splits = static_cast<int32_t>(plan.splits);
  p.parts = reinterpret_cast<float*>(memory + plan.parts);
  const auto launch = [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    using Mma = DenseGradientMma<T, kWarps>;
    PYDENSE_LAUNCH((dense_gradient_mma_kernel<T, kWarps>),
                   (LaunchConfig{dim3(static_cast<unsigned>(plan.items)), dim3(Mma::kThreads),
                                 Mma::kBytes, device, stream}),
                   p);
  };
  if (plan.warps == kManyWarps) {
    launch(std::integral_constant<int, kManyWarps>{});
  } else {
    launch(std::integral_constant<int, kFewWarps>{});
  }
  DenseGradientSumParams<T> sum = {};
  sum.parts = p.parts;
  sum.part_outputs = plan.outputs;
  sum.part_channels = plan.channels;
  sum.splits = p.splits;
  sum.taps = p.taps;
  sum.channels = static_cast<int32_t>(s.channels);
  sum.channel_tiles = static_cast<uint32_t>(ceil_div(s.channels, int64_t{kDenseGradientThreads}));
  sum.tap_tiles = static_cast<uint32_t>(ceil_div(s.taps(), int64_t{kDenseGradientTaps}));
  sum.weight = static_cast<T*>(args.weight);
  const int64_t blocks = s.outputs * sum.channel_tiles * sum.tap_tiles;
  PYDENSE_CHECK(blocks <= INT32_MAX, op, ": weight must have less than 2^31 tiles, got ", blocks);
  PYDENSE_LAUNCH(dense_gradient_sum_kernel<T>,
                 (LaunchConfig{dim3(static_cast<unsigned>(blocks)), dim3(kDenseGradientThreads), 0,
                               device, stream}),
                 sum);
}

}  // namespace

int64_t dense_conv_weight_gradient_cuda_workspace(const char* op, FloatType dtype,
                                                  const DenseConvGradientArgs& args) {
  return with_tensor_core_type(op, dtype, [&]<class T>(T) { return Plan<T>(op, args).bytes; });
}

void dense_conv_weight_gradient_cuda(const char* op, FloatType dtype,
                                     const DenseConvGradientArgs& args, void* workspace, int device,
                                     void* stream) {
  with_tensor_core_type(op, dtype,
                        [&]<class T>(T) { run<T>(op, args, workspace, device, stream); });
}

}  // namespace pydense
