// SPDX-License-Identifier: Apache-2.0
// One stage of chained residual pooling with 1x1 convolutions: pool, convolve, add residuals.
//
//   out = addends[0] + addends[1] + ... + (weight pool(x) + bias)
//
// The pooled tile goes from the pool straight into the matrix product and never to memory, unless
// it is asked for. Results have the same bits for any number of threads, in both memory formats and
// on all instruction sets with fused multiply-add; BFloat16 has other bits where pairs of it are
// multiplied (common/gemm/gemm_bf16.h).
#pragma once

#include "chained_residual_pool/max_pool.h"

namespace pydense {

constexpr int kMaxResidualStages = 64;

// S, the type in memory, is float, double, BFloat16 or Half. shape.size 1: nothing is pooled.
struct ResidualStageArgs {
  PoolShape shape;
  PoolSource x;
  const void* weight;  // S [C, C], output by input
  const void* bias;    // S [C], or null
  const PoolSource* addends;
  int num_addends;           // at most kMaxResidualStages
  void* out;                 // S, dense
  void* pooled;              // S, dense: pool(x); or null
  uint8_t* offsets;          // of the pool, dense; or null
  bool transposed = false;   // weight is input by output: the gradient of a convolution
  bool pooled_late = false;  // it is read when caches have lost it
};

// From here on such a pooled map goes past the caches.
constexpr int64_t kStreamedBytes = 4 << 20;

struct ResidualSumArgs {
  PoolShape shape;
  const PoolSource* addends;
  int num_addends;
  void* out;  // S, dense
};

void residual_stage(const char* op, FloatType dtype, const ResidualStageArgs& args,
                    ParallelFor parallel_for);

// Sums from the first addend to the last, in float for 16-bit numbers, rounded once.
void residual_sum(FloatType dtype, const ResidualSumArgs& args, ParallelFor parallel_for);

// On a GPU. x and addends are dense. The product is on tensor cores for 16-bit numbers; float and
// double have the bits of the CPU.
void residual_stage_cuda(const char* op, FloatType dtype, const ResidualStageArgs& args, int device,
                         void* stream);

// There, whether the pool of a stage is part of its product. Else it is a kernel of its own, and
// `pooled` must be given. What a block reads around its 8 x 16 pixels, and reduces along x more
// than once, grows with the window: at 7 x 7 it takes about the time that a trip of the pooled
// picture through memory takes, and a block needs more shared memory than cards of all kinds have.
// The windows of published networks are 5 x 5.
inline bool residual_stage_cuda_fuses(const PoolShape& shape) { return shape.size <= 5; }

void residual_sum_cuda(FloatType dtype, const ResidualSumArgs& args, int device, void* stream);

// By FloatType.
struct ResidualStageTable {
  void (*stage[4])(const ResidualStageArgs&, ParallelFor);
  void (*sum[4])(const ResidualSumArgs&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(ResidualStageTable, kResidualStageTable)
#if defined(PYDENSE_X86_KERNELS)
namespace avx512_bf16 {
void residual_stage_bf16(const ResidualStageArgs& args, ParallelFor parallel_for);
}
#endif

}  // namespace pydense
