// SPDX-License-Identifier: Apache-2.0
// The kernel of exact_fast.h for compute capability 9.0, beside that for all cards: experimental
// (common/experimental.cuh).
#pragma once

#include "dense_crf/exact_fast_data.cuh"

namespace pydense {

// With swizzled values of `width` rows; as many blocks as exact_fast_kernel has.
void exact_wgmma_cuda(const FastParams& p, int64_t width, int64_t blocks, int device, void* stream);

}  // namespace pydense
