// SPDX-License-Identifier: Apache-2.0
// The kernel of dense convolutions for compute capability 9.0, beside that for all cards.
#pragma once

#include "atrous_conv/dense_tile.cuh"

namespace pydense {

// Whether it shall run: it has never run on a GPU, and does so with PYDENSE_EXPERIMENTAL_KERNELS=1
// alone, for 16-bit types on such a card.
bool dense_wgmma_is_wanted(int device);

// The convolutions of `args`, whose operands lie as `p` says. T is __half or __nv_bfloat16.
template <class T>
void dense_wgmma(const char* op, const DenseConvArgs* args, int count, const DenseMmaParams<T>& p,
                 int device, void* stream);

}  // namespace pydense
