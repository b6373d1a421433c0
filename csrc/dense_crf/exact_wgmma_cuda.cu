// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "dense_crf/exact_wgmma.h"
#include "dense_crf/exact_wgmma_kernels.cuh"

namespace pydense {
namespace {

template <int kDims, int kWidth>
void launch(const FastParams& p, int64_t blocks, int device, void* stream) {
  // The kernel looks for the first place that operands may begin at.
  constexpr size_t kShared = sizeof(FilterShared<kDims, kWidth>) + 1024;
  const LaunchConfig config = {dim3(static_cast<unsigned>(blocks)), dim3(kFilterThreads), kShared,
                               device, stream};
  PYDENSE_LAUNCH((exact_wgmma_kernel<kDims, kWidth>), config, p);
}

template <int kWidth>
void launch(const FastParams& p, int64_t blocks, int device, void* stream) {
  if (p.order.width == 5) {
    launch<5, kWidth>(p, blocks, device, stream);
  } else {
    launch<10, kWidth>(p, blocks, device, stream);
  }
}

}  // namespace

void exact_wgmma_cuda(const FastParams& p, int64_t width, int64_t blocks, int device,
                      void* stream) {
  if (width == 8) {
    launch<8>(p, blocks, device, stream);
  } else if (width == 24) {
    launch<24>(p, blocks, device, stream);
  } else {
    launch<48>(p, blocks, device, stream);
  }
}

}  // namespace pydense
