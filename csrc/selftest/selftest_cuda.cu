// SPDX-License-Identifier: Apache-2.0
#include "common/launch.cuh"
#include "selftest/selftest_kernels.cuh"

namespace pydense {

void selftest_cuda(const SelftestArgs& args, int device, void* stream) {
  if (args.n == 0) {
    return;
  }
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int64_t blocks = ceil_div(args.n, kSelftestThreads);
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks)),
      dim3(kSelftestThreads), 0, device, stream};
  PYDENSE_LAUNCH(selftest_kernel, config, args);
}

}  // namespace pydense
