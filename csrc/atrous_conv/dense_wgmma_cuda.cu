// SPDX-License-Identifier: Apache-2.0
#include <cudaTypedefs.h>

#include <algorithm>

#include "atrous_conv/dense_wgmma.h"
#include "atrous_conv/dense_wgmma_kernels.cuh"
#include "common/experimental.cuh"
#include "common/launch.cuh"
#include "common/parallel.h"

namespace pydense {
namespace {

// Of the driver, which nothing is linked with.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                              cudaEnableDefault, &found),
             "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("cuTensorMapEncodeTiled: the driver does not have it");
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// Sizes and boxes go from the innermost axis on; strides, in elements, from the next one.
template <class T, int kAxes>
CUtensorMap map_of(PFN_cuTensorMapEncodeTiled_v12000 encode, const T* data,
                   const int64_t (&sizes)[kAxes], const int64_t (&strides)[kAxes - 1],
                   const int32_t (&box)[kAxes]) {
  CUtensorMap map = {};
  cuuint64_t extents[kAxes];
  cuuint64_t bytes[kAxes - 1];
  cuuint32_t boxes[kAxes];
  cuuint32_t steps[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    extents[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) {
      // The stride of an axis of one element does not count, and may be none that is allowed.
      bytes[i - 1] = sizes[i] == 1 ? 16 : static_cast<cuuint64_t>(strides[i - 1]) * sizeof(T);
    }
  }
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(&map, type, kAxes, const_cast<T*>(data), extents, bytes, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace

bool dense_wgmma_is_wanted(int device) { return experimental_sm90_kernels(device); }

template <class T>
void dense_wgmma(const char* op, const DenseConvArgs* args, int count, const DenseMmaParams<T>& p,
                 int device, void* stream) {
  const CudaDeviceScope scope(device);
  const auto encode = encoder();
  DenseWgmmaParams<T> own = {};
  const DenseConvShape& first = args[0].shape;
  for (int i = 0; i < kDenseBoxShapes; ++i) {
    own.x[i] =
        map_of<T, 4>(encode, p.x, {p.channels, first.width, first.height, first.batches},
                     {p.x_pixel, p.x_row, p.x_batch}, {kWgmmaDepth, dense_box_width(i), 1 << i, 1});
  }
  for (int i = 0; i < count; ++i) {
    const DenseConvShape& s = args[i].shape;
    own.branches[i] = p.branches[i];
    DenseBranch<T>& branch = own.branches[i];
    branch.column_tiles = static_cast<uint32_t>(ceil_div(s.outputs, int64_t{kWgmmaColumns}));
    // A map has no negative stride: the first tap in memory is the last one.
    const bool turned = branch.weight_tap < 0;
    const int64_t tap = turned ? -branch.weight_tap : branch.weight_tap;
    const T* const weight = turned ? branch.weight - (s.taps() - 1) * tap : branch.weight;
    own.weights[i] = map_of<T, 3>(encode, weight, {p.channels, s.outputs, s.taps()},
                                  {branch.weight_output, tap}, {kWgmmaDepth, kWgmmaColumns, 1});
    own.steps[i] = {static_cast<int32_t>(ceil_div(int64_t{p.channels}, int64_t{kWgmmaDepth})),
                    branch.dilation_y,
                    branch.dilation_x,
                    branch.top,
                    branch.left,
                    branch.kernel_width,
                    turned ? static_cast<int32_t>(s.taps() - 1) : -1};
  }
  for (const DenseBoxLaunch& launch : dense_box_launches(op, args, count, kWgmmaColumns)) {
    own.num_classes = static_cast<int32_t>(launch.classes.size());
    own.items = static_cast<uint32_t>(launch.items);
    std::copy(launch.classes.begin(), launch.classes.end(), own.classes);
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(launch.items, kMultiprocessors));
    PYDENSE_LAUNCH(dense_wgmma_kernel<T>,
                   (LaunchConfig{dim3(blocks), dim3(kWgmmaThreads),
                                 sizeof(DenseWgmmaShared<T>) + 1024, device, stream}),
                   own);
  }
}

template void dense_wgmma<__half>(const char*, const DenseConvArgs*, int,
                                  const DenseMmaParams<__half>&, int, void*);
template void dense_wgmma<__nv_bfloat16>(const char*, const DenseConvArgs*, int,
                                         const DenseMmaParams<__nv_bfloat16>&, int, void*);

}  // namespace pydense
