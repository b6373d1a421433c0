// SPDX-License-Identifier: Apache-2.0
// 2^x for sums of exponentials: in float one instruction of the special-function unit, exact to 2
// units in the last place, with 0 for results below 2^-126.
#pragma once

#include "common/cuda.cuh"

namespace pydense {

__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126F ? 0.0F : y;
#endif
}
__device__ __forceinline__ double fast_exp2(double x) { return exp2(x); }

}  // namespace pydense
