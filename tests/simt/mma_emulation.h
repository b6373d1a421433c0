// SPDX-License-Identifier: Apache-2.0
// mma.sync, ldmatrix and cp.async as the PTX manual describes them, for common/mma.cuh. Not yet
// compared with a GPU. They are the shim's: what they cost here is not counted for the kernel.
#pragma once

#include "simt.h"

namespace simt {

// T: __half or __nv_bfloat16.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_HERE);

// Of TF32: the lower 13 bits of operands do not count.
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_HERE);
uint32_t round_to_tf32(uint32_t bits);

void load_matrix(uint32_t* r, const void* row, unsigned tiles, bool transposed, SIMT_HERE);

// With an odd seed a copy lands at once, with an even one as late as the kernel allows: at the wait
// that asks for it.
void copy_async_16(void* to, const void* from, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

}  // namespace simt
