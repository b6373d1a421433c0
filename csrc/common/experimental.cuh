// SPDX-License-Identifier: Apache-2.0
// Whether kernels for compute capability 9.0 that have never run on a GPU shall: with
// PYDENSE_EXPERIMENTAL_KERNELS=1 alone, on such a card, and under the shim.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/launch.cuh"

namespace pydense {

inline bool experimental_sm90_kernels(int device) {
  const char* const switched = std::getenv("PYDENSE_EXPERIMENTAL_KERNELS");
  if (switched == nullptr || std::strcmp(switched, "1") != 0) {
    return false;
  }
#ifdef PYDENSE_SIMT
  static_cast<void>(device);
  return true;
#else
  int major = 0;
  int minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
#endif
}

}  // namespace pydense
