// SPDX-License-Identifier: Apache-2.0
// What was compiled in. CMake defines the macros for build_info.cpp alone.
#pragma once

namespace pydense {

struct BuildInfo {
  const char* version;
  const char* compiler;
  const char* build_type;
  const char* cuda_architectures;  // "" without CUDA
  const char* cuda_toolkit;        // "" without CUDA
};
const BuildInfo& build_info();

}  // namespace pydense
