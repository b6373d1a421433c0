// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "atrous_conv/dense_layout.cuh"
#include "atrous_conv/separable.h"
#include "atrous_conv/separable_mma_kernels.cuh"

namespace pydense {
namespace {

// The 1x1 convolution, as the dense kernels' tiles have it, and what it needs of memory.
template <class T>
struct Plan {
  DenseConvArgs pointwise = {};
  int64_t channels;     // with those that fill vectors
  int64_t matrix = -1;  // or the weight is read where it is
  int64_t parts = 0;
  int64_t bytes = 0;
  DenseLaunch launch;

  Plan(const char* op, const SeparableArgs& args) {
    const DepthwiseShape& s = args.shape;
    check_separable(op, args);
    PYDENSE_CHECK(s.kernel_height == kSeparableKernel && s.kernel_width == kSeparableKernel, op,
                  ": depthwise_weight must have a kernel of 3 x 3 on CUDA, got (", s.kernel_height,
                  ", ", s.kernel_width, ")");
    constexpr int64_t kMostSize = INT32_MAX - 256;
    PYDENSE_CHECK(s.channels <= kMostSize && args.outputs <= kMostSize, op,
                  ": x must have less than 2^31 - 256 channels and outputs on CUDA, got ",
                  s.channels, " and ", args.outputs);
    channels = dense_vector_channels<T>(s.channels);
    DenseConvShape& shape = pointwise.shape;
    shape = {s.batches,
             s.channels,
             args.outputs,
             s.out_height,
             s.out_width,
             s.out_height,
             s.out_width,
             1,
             1,
             1,
             1,
             0,
             0};
    pointwise.weight = {args.pointwise_weight, s.channels, 1, 1, false};
    const int64_t pixels = s.out_height * s.out_width;
    pointwise.out = s.channels_last
                        ? DenseConvTarget{args.out, pixels * args.outputs, 1,
                                          s.out_width * args.outputs, args.outputs}
                        : DenseConvTarget{args.out, pixels * args.outputs, pixels, s.out_width, 1};
    if (s.batches == 0) {
      return;
    }
    const auto piece = [&](int64_t elements, int64_t size) {
      const int64_t at = bytes;
      bytes += ceil_div(elements * size, int64_t{256}) * 256;
      return at;
    };
    if (!dense_reads_in_place<T>(pointwise.weight, shape)) {
      matrix = piece(args.outputs * channels, static_cast<int64_t>(sizeof(T)));
    }
    launch = dense_launches(op, &pointwise, 1, kSeparableColumns, kDenseDepth<T>).front();
    launch.classes[0].rate = static_cast<uint16_t>(
        std::min<int64_t>(s.dilation_y, std::min<int64_t>(s.out_height, UINT16_MAX)));
    parts = piece(launch.parts * kDenseRows * kSeparableColumns, 4);
  }
};

template <class T>
SeparableMmaParams<T> params_of(const SeparableArgs& args, const Plan<T>& plan, void* workspace,
                                int device, void* stream) {
  const DepthwiseShape& s = args.shape;
  SeparableMmaParams<T> p = {};
  p.dense.x = static_cast<const T*>(args.x.data);
  p.dense.x_batch = args.x.batch;
  p.dense.x_row = args.x.row;
  p.dense.x_pixel = s.channels_last ? s.channels : 1;
  p.x_channel = s.channels_last ? 1 : args.x.channel;
  p.dense.channels = static_cast<int32_t>(plan.channels);
  p.dense.chunks = static_cast<int32_t>(ceil_div(plan.channels, int64_t{kDenseDepth<T>}));
  p.dense.num_classes = 1;
  p.dense.tile_columns = kSeparableColumns;
  p.dense.parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.parts);
  p.dense.classes[0] = plan.launch.classes[0];
  DenseBranch<T>& branch = p.dense.branches[0];
  branch.weight = static_cast<const T*>(args.pointwise_weight);
  branch.weight_output = s.channels;
  if (plan.matrix >= 0) {
    T* const to = reinterpret_cast<T*>(static_cast<char*>(workspace) + plan.matrix);
    lay_out_dense_weight<T>(plan.pointwise.weight, plan.pointwise.shape, to, device, stream);
    branch.weight = to;
    branch.weight_output = plan.channels;
  }
  const DenseConvTarget& out = plan.pointwise.out;
  branch.bias = static_cast<const float*>(args.pointwise_bias);
  branch.out = static_cast<T*>(out.data);
  branch.out_batch = out.batch;
  branch.out_channel = out.channel;
  branch.out_row = out.row;
  branch.out_pixel = out.pixel;
  branch.outputs = static_cast<int32_t>(args.outputs);
  branch.column_tiles = static_cast<uint32_t>(ceil_div(args.outputs, int64_t{kSeparableColumns}));
  branch.kernel_width = 1;
  branch.relu = args.relu;
  branch.out_vectors = out.channel == 1 && args.outputs % kDenseVector<T> == 0 &&
                       dense_are_vectors<T>(out.data, out.batch, out.row, out.pixel, s.batches,
                                            s.out_height, s.out_width);
  p.weight = static_cast<const T*>(args.depthwise_weight);
  p.bias = static_cast<const T*>(args.depthwise_bias);
  p.channels = static_cast<int32_t>(s.channels);
  p.inner_relu = args.inner_relu;
  p.height = s.height;
  p.width = s.width;
  p.dilation_y = s.dilation_y;
  p.dilation_x = s.dilation_x;
  p.top = s.top;
  p.left = s.left;
  p.row_step = s.dilation_y * p.dense.x_row;
  p.column_step = s.dilation_x * p.dense.x_pixel;
  return p;
}

template <class T>
void run(const char* op, const SeparableArgs& args, void* workspace, int device, void* stream) {
  const Plan<T> plan(op, args);
  if (args.shape.batches == 0) {
    return;
  }
  const auto p = params_of<T>(args, plan, workspace, device, stream);
  const auto launch = [&]<bool kVectors>(std::bool_constant<kVectors>) {
    PYDENSE_LAUNCH(
        (separable_mma_kernel<T, kVectors>),
        (LaunchConfig{dim3(static_cast<unsigned>(plan.launch.items)), dim3(kSeparableThreads),
                      SeparableMma<T, kVectors>::kBytes, device, stream}),
        p);
  };
  const DepthwiseShape& s = args.shape;
  if (s.channels_last && s.channels % kDenseVector<T> == 0 &&
      dense_are_vectors<T>(args.x.data, args.x.batch, args.x.row, s.channels, s.batches, s.height,
                           s.width)) {
    launch(std::true_type{});
  } else {
    launch(std::false_type{});
  }
  if (plan.launch.sums > 0) {
    PYDENSE_LAUNCH(dense_sum_kernel<T>,
                   (LaunchConfig{dim3(static_cast<unsigned>(plan.launch.sums *
                                                            (kSeparableColumns / kDenseColumns))),
                                 dim3(kDenseSumThreads), 0, device, stream}),
                   p.dense);
  }
}

}  // namespace

int64_t separable_cuda_workspace(const char* op, FloatType dtype, const SeparableArgs& args) {
  return with_tensor_core_type(op, dtype, [&]<class T>(T) { return Plan<T>(op, args).bytes; });
}

void separable_cuda(const char* op, FloatType dtype, const SeparableArgs& args, void* workspace,
                    int device, void* stream) {
  with_tensor_core_type(op, dtype,
                        [&]<class T>(T) { run<T>(op, args, workspace, device, stream); });
}

}  // namespace pydense
