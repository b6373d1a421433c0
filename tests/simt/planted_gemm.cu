// SPDX-License-Identifier: Apache-2.0
// For nvcc: the PTX of common/mma.cuh, whose only users are in tests so far.
#include "planted_gemm.cuh"

namespace planted {

template void run_gemm<kNone, __half>(const Gemm<__half>&);
template void run_gemm<kNone, __nv_bfloat16>(const Gemm<__nv_bfloat16>&);

}  // namespace planted
