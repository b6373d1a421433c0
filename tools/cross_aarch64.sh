#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the torch-free core and its C++ tests for aarch64 and runs them under qemu-user.
#   tools/cross_aarch64.sh [BUILD_DIR]        default: build/aarch64
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/aarch64}

for program in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja; do
  command -v "$program" >/dev/null || {
    echo "cross_aarch64: $program is missing" \
      "(Debian: apt-get install g++-aarch64-linux-gnu qemu-user cmake ninja-build)" >&2
    exit 2
  }
done

cmake -S "$root" -B "$build" -G Ninja \
  -DCMAKE_TOOLCHAIN_FILE="$root/cmake/aarch64-toolchain.cmake" \
  -DPYDENSE_TESTS=ON -DPYDENSE_CUDA=OFF
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}"
# Emulation is slow: the tests that take a second at home may take a minute here.
ctest --test-dir "$build" --output-on-failure --timeout 600
