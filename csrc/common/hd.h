// SPDX-License-Identifier: Apache-2.0
// PYDENSE_HD marks maths that CPU and CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define PYDENSE_HD __host__ __device__ __forceinline__
#else
#define PYDENSE_HD inline __attribute__((always_inline))
#endif
