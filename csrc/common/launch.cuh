// SPDX-License-Identifier: Apache-2.0
// The only way a kernel is launched: on the given device and stream, with the limits checked, and
// with launch errors turned into exceptions. With PYDENSE_SIMT the launch runs on the CPU instead
// (tests/simt): the launcher's own code is the same in both.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "common/cuda.cuh"

namespace pydense {

// Of the card that work is cut for, an H200. Results never depend on it.
constexpr int64_t kMultiprocessors = 132;

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  int device;
  void* stream;  // cudaStream_t
};

inline void check_launch(const LaunchConfig& config, const char* kernel) {
  constexpr size_t kMaxShared = 227 * 1024;
  PYDENSE_CHECK(config.grid.x >= 1 && config.grid.x <= 0x7FFFFFFFU && config.grid.y >= 1 &&
                    config.grid.y <= 65535 && config.grid.z >= 1 && config.grid.z <= 65535,
                kernel, ": grid must be within [2^31 - 1, 65535, 65535] and not empty, got [",
                config.grid.x, ", ", config.grid.y, ", ", config.grid.z, "]");
  const uint64_t threads = uint64_t{config.block.x} * config.block.y * config.block.z;
  PYDENSE_CHECK(threads >= 1 && threads <= 1024 && config.block.z <= 64, kernel,
                ": block must have 1 to 1024 threads, at most 64 in z, got [", config.block.x, ", ",
                config.block.y, ", ", config.block.z, "]");
  PYDENSE_CHECK(config.shared_bytes <= kMaxShared, kernel, ": shared memory must be at most ",
                kMaxShared, " bytes, got ", config.shared_bytes);
}

}  // namespace pydense

#ifdef PYDENSE_SIMT

#define PYDENSE_LAUNCH(kernel, config, ...)                                  \
  do {                                                                       \
    const ::pydense::LaunchConfig& launch_config = (config);                 \
    ::pydense::check_launch(launch_config, #kernel);                         \
    ::simt::launch(#kernel, kernel, launch_config.grid, launch_config.block, \
                   launch_config.shared_bytes __VA_OPT__(, ) __VA_ARGS__);   \
  } while (false)

#else

namespace pydense {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaErrorNoKernelImageForDevice) {
    throw std::runtime_error(std::string(what) +
                             ": this build has no code for this GPU (compute capability 8.0 or "
                             "later is needed, or a build with PYDENSE_CUDA_ARCHS)");
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Makes `device` current for the scope.
class CudaDeviceScope {
 public:
  explicit CudaDeviceScope(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) {
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  CudaDeviceScope(const CudaDeviceScope&) = delete;
  CudaDeviceScope& operator=(const CudaDeviceScope&) = delete;
  ~CudaDeviceScope() {
    if (changed_) {  // setting a device that nobody uses would create its context
      static_cast<void>(cudaSetDevice(previous_));
    }
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace pydense

// PYDENSE_LAUNCH(kernel, config, args...); a kernel with several template arguments stands in
// parentheses: PYDENSE_LAUNCH((kernel<T, 4>), ...). More than 48 KB of shared memory must be asked
// for.
#define PYDENSE_LAUNCH(kernel, config, ...)                                         \
  do {                                                                              \
    const ::pydense::LaunchConfig& launch_config = (config);                        \
    ::pydense::check_launch(launch_config, #kernel);                                \
    const ::pydense::CudaDeviceScope launch_device(launch_config.device);           \
    if (launch_config.shared_bytes > 48 * 1024) {                                   \
      ::pydense::check_cuda(                                                        \
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                               static_cast<int>(launch_config.shared_bytes)),       \
          #kernel ": shared memory");                                               \
    }                                                                               \
    kernel<<<launch_config.grid, launch_config.block, launch_config.shared_bytes,   \
             static_cast<cudaStream_t>(launch_config.stream)>>>(__VA_ARGS__);       \
    ::pydense::check_cuda(cudaGetLastError(), #kernel ": launch");                  \
  } while (false)

#endif
