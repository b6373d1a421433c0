// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "atrous_conv/dense_cuda.h"
#include "atrous_conv/dense_layout.cuh"
#include "atrous_conv/dense_mma_kernels.cuh"
#include "atrous_conv/dense_wgmma.h"

namespace pydense {
namespace {

constexpr int kManyWarps = 8;
constexpr int kFewWarps = 4;  // where no more outputs are there

// What a call needs of memory, and where: operands in their order, then the parts of sums.
template <class T>
struct Plan {
  int warps;
  int64_t channels;  // with those that fill vectors
  int64_t bytes = 0;
  int64_t x = -1;  // or x is read where it is
  int64_t weights[kMaxDenseConvolutions];
  int64_t parts;
  std::vector<DenseLaunch> launches;

  int64_t columns() const { return warps * kDenseColumns; }
  int64_t depth() const { return kDenseDepth<T>; }

  Plan(const char* op, const DenseConvCudaArgs& args) {
    PYDENSE_CHECK(args.count >= 1 && args.count <= kMaxDenseConvolutions, op,
                  ": weights must be 1 to ", kMaxDenseConvolutions, ", got ", args.count);
    const DenseConvArgs& first = args.convolutions[0];
    channels = dense_vector_channels<T>(first.shape.channels);
    int64_t most = 0;
    for (int i = 0; i < args.count; ++i) {
      dense_conv_check(op, args.convolutions[i].shape);
      most = std::max(most, args.convolutions[i].shape.outputs);
    }
    constexpr int64_t kMostSize = INT32_MAX - 256;
    PYDENSE_CHECK(channels <= kMostSize && most <= kMostSize, op,
                  ": x must have less than 2^31 - 256 channels and outputs on CUDA, got ",
                  first.shape.channels, " and ", most);
    if (first.shape.batches == 0) {
      return;
    }
    warps = most > kFewWarps * kDenseColumns ? kManyWarps : kFewWarps;
    const auto piece = [&](int64_t elements, int64_t size) {
      const int64_t at = bytes;
      bytes += ceil_div(elements * size, int64_t{256}) * 256;
      return at;
    };
    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
    if (!dense_reads_in_place<T>(first.x, first.shape, first.shape.channels)) {
      x = piece(first.shape.batches * first.shape.height * first.shape.width * channels, kSize);
    }
    for (int i = 0; i < args.count; ++i) {
      const DenseConvArgs& own = args.convolutions[i];
      weights[i] = -1;
      if (own.packed == nullptr && !dense_reads_in_place<T>(own.weight, own.shape)) {
        weights[i] = piece(own.shape.taps() * own.shape.outputs * channels, kSize);
      }
    }
    launches = dense_launches(op, args.convolutions, args.count, columns(), depth());
    int64_t most_parts = 0;
    for (const DenseLaunch& launch : launches) {
      most_parts = std::max(most_parts, launch.parts);
    }
    parts = piece(most_parts * kDenseRows * columns(), 4);
  }
};

template <class T>
DenseBranch<T> branch_of(const DenseConvArgs& args, const Plan<T>& plan, int64_t at,
                         void* workspace, int device, void* stream) {
  constexpr int64_t kVector = kDenseVector<T>;
  const DenseConvShape& shape = args.shape;
  DenseBranch<T> branch = {};
  if (args.packed != nullptr) {
    branch.weight = static_cast<const T*>(args.packed);
    branch.weight_output = plan.channels;
    branch.weight_tap = shape.outputs * plan.channels;
  } else if (at < 0) {
    const int64_t last = args.weight.flipped ? shape.taps() - 1 : 0;
    branch.weight = static_cast<const T*>(args.weight.data) + last * args.weight.tap;
    branch.weight_output = args.weight.output;
    branch.weight_tap = args.weight.flipped ? -args.weight.tap : args.weight.tap;
  } else {
    T* const to = reinterpret_cast<T*>(static_cast<char*>(workspace) + at);
    lay_out_dense_weight<T>(args.weight, shape, to, device, stream);
    branch.weight = to;
    branch.weight_output = plan.channels;
    branch.weight_tap = shape.outputs * plan.channels;
  }
  branch.scale = static_cast<const float*>(args.scale);
  branch.bias = static_cast<const float*>(args.bias);
  branch.out = static_cast<T*>(args.out.data);
  branch.out_batch = args.out.batch;
  branch.out_channel = args.out.channel;
  branch.out_row = args.out.row;
  branch.out_pixel = args.out.pixel;
  branch.outputs = static_cast<int32_t>(shape.outputs);
  branch.column_tiles = static_cast<uint32_t>(ceil_div(shape.outputs, plan.columns()));
  branch.kernel_width = static_cast<int32_t>(shape.kernel_width);
  branch.dilation_y = static_cast<int32_t>(shape.dilation_y);
  branch.dilation_x = static_cast<int32_t>(shape.dilation_x);
  branch.top = static_cast<int32_t>(shape.top);
  branch.left = static_cast<int32_t>(shape.left);
  branch.relu = args.relu;
  branch.out_vectors =
      args.out.channel == 1 && shape.outputs % kVector == 0 &&
      dense_are_vectors<T>(args.out.data, args.out.batch, args.out.row, args.out.pixel,
                           shape.batches, shape.out_height, shape.out_width);
  return branch;
}

template <class T, int kWarps>
void launch_all(const Plan<T>& plan, DenseMmaParams<T>& p, int device, void* stream) {
  using Mma = DenseMma<T, kWarps>;
  for (const DenseLaunch& launch : plan.launches) {
    p.num_classes = static_cast<int32_t>(launch.classes.size());
    std::copy(launch.classes.begin(), launch.classes.end(), p.classes);
    PYDENSE_LAUNCH((dense_mma_kernel<T, kWarps>),
                   (LaunchConfig{dim3(static_cast<unsigned>(launch.items)), dim3(Mma::kThreads),
                                 Mma::kBytes, device, stream}),
                   p);
    if (launch.sums > 0) {
      // Of the classes, those that have parts; the others have no tiles among the sums.
      DenseMmaParams<T> sums = p;
      const auto end = std::copy_if(launch.classes.begin(), launch.classes.end(), sums.classes,
                                    [](const DenseClass& c) { return c.splits > 1; });
      sums.num_classes = static_cast<int32_t>(end - sums.classes);
      PYDENSE_LAUNCH(dense_sum_kernel<T>,
                     (LaunchConfig{dim3(static_cast<unsigned>(launch.sums * kWarps)),
                                   dim3(kDenseSumThreads), 0, device, stream}),
                     sums);
    }
  }
}

template <class T>
void run(const char* op, const DenseConvCudaArgs& args, void* workspace, int device, void* stream) {
  const Plan<T> plan(op, args);
  const DenseConvArgs& first = args.convolutions[0];
  DenseMmaParams<T> p = {};
  p.channels = static_cast<int32_t>(plan.channels);
  p.chunks = static_cast<int32_t>(ceil_div(plan.channels, plan.depth()));
  p.tile_columns = static_cast<int32_t>(plan.columns());
  p.parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.parts);
  p.x = static_cast<const T*>(first.x.data);
  p.x_batch = first.x.batch;
  p.x_row = first.x.row;
  p.x_pixel = first.x.pixel;
  if (plan.x >= 0) {
    T* const to = reinterpret_cast<T*>(static_cast<char*>(workspace) + plan.x);
    lay_out_dense_pixels<T>(first.x, first.shape.batches, first.shape.channels, first.shape.height,
                            first.shape.width, to, device, stream);
    p.x = to;
    p.x_pixel = plan.channels;
    p.x_row = first.shape.width * plan.channels;
    p.x_batch = first.shape.height * p.x_row;
  }
  for (int i = 0; i < args.count; ++i) {
    p.branches[i] =
        branch_of<T>(args.convolutions[i], plan, plan.weights[i], workspace, device, stream);
  }
#ifndef PYDENSE_SIMT
  if constexpr (sizeof(T) == 2) {
    if (dense_wgmma_is_wanted(device)) {
      return dense_wgmma<T>(op, args.convolutions, args.count, p, device, stream);
    }
  }
#endif
  if (plan.warps == kManyWarps) {
    launch_all<T, kManyWarps>(plan, p, device, stream);
  } else {
    launch_all<T, kFewWarps>(plan, p, device, stream);
  }
}

}  // namespace

int64_t dense_conv_cuda_workspace(const char* op, FloatType dtype, const DenseConvCudaArgs& args) {
  return with_tensor_core_type(op, dtype, [&]<class T>(T) { return Plan<T>(op, args).bytes; });
}

void dense_conv_cuda(const char* op, FloatType dtype, const DenseConvCudaArgs& args,
                     void* workspace, int device, void* stream) {
  if (args.convolutions[0].shape.batches == 0) {
    return;
  }
  with_tensor_core_type(op, dtype,
                        [&]<class T>(T) { run<T>(op, args, workspace, device, stream); });
}

int64_t dense_conv_cuda_packed_bytes(const char* op, FloatType dtype, const DenseConvShape& shape) {
  return with_tensor_core_type(op, dtype, [&]<class T>(T) {
    return shape.taps() * shape.outputs * dense_vector_channels<T>(shape.channels) *
           static_cast<int64_t>(sizeof(T));
  });
}

void dense_conv_cuda_pack(const char* op, FloatType dtype, const DenseConvShape& shape,
                          const DenseConvWeight& weight, void* packed, int device, void* stream) {
  with_tensor_core_type(op, dtype, [&]<class T>(T) {
    lay_out_dense_weight<T>(weight, shape, static_cast<T*>(packed), device, stream);
  });
}

}  // namespace pydense
