// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/cuda.cuh"
#include "selftest/selftest.h"

namespace pydense {

constexpr int kSelftestThreads = 256;

// A grid-stride loop, so that any n works with a grid of any size.
__global__ __launch_bounds__(kSelftestThreads) void selftest_kernel(SelftestArgs args) {
  const int64_t stride = int64_t{gridDim.x} * kSelftestThreads;
  for (int64_t i = int64_t{blockIdx.x} * kSelftestThreads + threadIdx.x; i < args.n; i += stride) {
    args.y[i] = args.x[i] * 2.0f + 1.0f;
  }
}

}  // namespace pydense
