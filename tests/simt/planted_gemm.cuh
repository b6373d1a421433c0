// SPDX-License-Identifier: Apache-2.0
// C = A B on tensor cores with a pipeline of two stages: the test of common/mma.cuh under the shim,
// and that nvcc takes it.
#pragma once

#include "common/mma.cuh"
#include "planted_kernels.cuh"

namespace planted {

constexpr int kTile = 64;            // of rows and of columns
constexpr int kDepth = 32;           // of a stage
constexpr int kPitchA = kDepth + 8;  // shifts rows over the banks
constexpr int kPitchB = kTile + 8;
constexpr int kStageA = kTile * kPitchA;
constexpr int kStageB = kDepth * kPitchB;

template <class T>
struct Gemm {
  const T* a;  // [m, k], k a multiple of 8
  const T* b;  // [k, n], n a multiple of 8
  float* c;    // [m, n]
  int m, n, k;
};

template <Bug B, class T>
__global__ void __launch_bounds__(128) gemm(Gemm<T> args) {
  PYDENSE_DYNAMIC_SHARED(T, shared);
  T* const tile_a = shared;
  T* const tile_b = shared + 2 * kStageA;
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int row0 = static_cast<int>(blockIdx.y) * kTile;
  const int column0 = static_cast<int>(blockIdx.x) * kTile;
  float sums[8][4] = {};
  const auto load = [&](int stage, int k0) {
    for (int i = thread; i < kTile * kDepth / 8; i += 128) {
      const int r = i / (kDepth / 8);
      const int k = i % (kDepth / 8) * 8;
      const bool valid = row0 + r < args.m && k0 + k < args.k;
      pydense::copy_async_16(
          tile_a + stage * kStageA + r * kPitchA + k,
          valid ? args.a + static_cast<size_t>(row0 + r) * args.k + k0 + k : args.a, valid);
    }
    for (int i = thread; i < kDepth * kTile / 8; i += 128) {
      const int k = i / (kTile / 8);
      const int c = i % (kTile / 8) * 8;
      const bool valid = k0 + k < args.k && column0 + c < args.n;
      pydense::copy_async_16(
          tile_b + stage * kStageB + k * kPitchB + c,
          valid ? args.b + static_cast<size_t>(k0 + k) * args.n + column0 + c : args.b, valid);
    }
    pydense::copy_async_commit();
  };
  const int stages = (args.k + kDepth - 1) / kDepth;
  load(0, 0);
  for (int s = 0; s < stages; ++s) {
    const int stage = s % 2;
    if (s + 1 < stages) {
      load(1 - stage, (s + 1) * kDepth);
      pydense::copy_async_wait<B == kWaitsForTooFewGroups ? 2 : 1>();
    } else {
      pydense::copy_async_wait<0>();
    }
    __syncthreads();
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[4];
      pydense::load_matrix_x4(
          a, tile_a + stage * kStageA + (warp * 16 + lane % 16) * kPitchA + k + lane / 16 * 8);
      for (int j = 0; j < 8; ++j) {
        uint32_t b[2];
        pydense::load_matrix_x2_transposed(
            b, tile_b + stage * kStageB + (k + lane % 16) * kPitchB + j * 8);
        pydense::mma_m16n8k16<T>(sums[j], a, b);
      }
    }
    if (B != kStageOverwritten) {
      __syncthreads();
    }
  }
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp * 16 + lane / 4 + (i >= 2 ? 8 : 0);
      const int column = column0 + j * 8 + lane % 4 * 2 + i % 2;
      if (row < args.m && column < args.n) {
        args.c[static_cast<size_t>(row) * args.n + column] = sums[j][i];
      }
    }
  }
}
template <Bug B, class T>
void run_gemm(const Gemm<T>& args) {
  const pydense::LaunchConfig config = {
      dim3((args.n + kTile - 1) / kTile, (args.m + kTile - 1) / kTile), dim3(128),
      2 * (kStageA + kStageB) * sizeof(T), 0, nullptr};
  PYDENSE_LAUNCH((gemm<B, T>), config, args);
}

}  // namespace planted
