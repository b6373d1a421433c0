// SPDX-License-Identifier: Apache-2.0
// wgmma with its left operand in registers, as the PTX manual describes it, for common/wgmma.cuh.
// Not yet compared with a GPU. What is noticed: no fence before a product, results that are read
// and left operands that are changed before the wait, a right operand that is overwritten before
// it, warps of four that issue different products; in the trace, shared memory that was written
// without show_to_products().
#pragma once

#include "simt.h"

namespace simt {

// As the 18 bits that descriptors have of it; of dynamic shared memory alone, which begins at some
// multiple of 16.
uint32_t shared_address(const void* at);

// With an odd seed a product is made at once, with an even one as late as the kernel allows: at the
// wait that asks for it. Until then its results are NaN.
enum class Operands { kBfloat16, kTf32 };
void wgmma(Operands operands, float* d, unsigned groups, const uint32_t* a, uint64_t b,
           Place place);

template <int kGroups>
void wgmma_bf16(float (&d)[kGroups][4], const uint32_t (&a)[4], uint64_t b, SIMT_HERE) {
  wgmma(Operands::kBfloat16, d[0], kGroups, a, b, place);
}
// The lower 13 bits of operands do not count.
template <int kGroups>
void wgmma_tf32(float (&d)[kGroups][4], const uint32_t (&a)[4], uint64_t b, SIMT_HERE) {
  wgmma(Operands::kTf32, d[0], kGroups, a, b, place);
}
void wgmma_fence(SIMT_HERE);
void wgmma_commit(SIMT_HERE);
void wgmma_wait(int pending, SIMT_HERE);
void show_to_products();

}  // namespace simt
