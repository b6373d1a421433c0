// SPDX-License-Identifier: Apache-2.0
// Matrix products of four warps, copies of boxes of tensors to shared memory, and barriers that
// wait for them: of compute capability 9.0 alone (sm_90a). The shim has none of it.
#pragma once

#include <cuda.h>

#include "common/cuda.cuh"

namespace pydense {

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// ---- barriers in shared memory, of 8 bytes ------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// For the copy engine to see what was initialised.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and has the phase wait for so many bytes of copies.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t over = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (over == 0);
}

// ---- copies of boxes ----------------------------------------------------------------------------
// Of the tensor that a map describes, from the coordinates on, innermost first; zeros for what lies
// beside it. Counts as bytes of the barrier.

__device__ __forceinline__ void copy_box_4d(void* to, const CUtensorMap& map, uint64_t* barrier,
                                            int32_t a, int32_t b, int32_t c, int32_t d) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}
__device__ __forceinline__ void copy_box_3d(void* to, const CUtensorMap& map, uint64_t* barrier,
                                            int32_t a, int32_t b, int32_t c) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(a), "r"(b), "r"(c)
      : "memory");
}

// ---- products of four warps ---------------------------------------------------------------------

// Rows of 128 bytes in shared memory, swizzled as copies of boxes leave them, eight rows after each
// other; the first row at a multiple of 1024 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* at) {
  constexpr uint64_t kEightRows = 1024 >> 4;
  constexpr uint64_t kSwizzle128 = 1;
  return (shared_address(at) & 0x3FFFFU) >> 4 | uint64_t{1} << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}
// Of elements further on in the rows.
__device__ __forceinline__ uint64_t matrix_descriptor_step(int bytes) {
  return static_cast<uint64_t>(bytes >> 4);
}

// The 64 registers of a product as operands of one instruction, which cannot be written as a loop.
#define PYDENSE_EIGHT(d, i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PYDENSE_WGMMA(types)                                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types                 \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"           \
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"   \
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"   \
               "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, " \
               "%64, %65, 1, 1, 1, 0, 0;"                                           \
               : PYDENSE_EIGHT(d, 0), PYDENSE_EIGHT(d, 8), PYDENSE_EIGHT(d, 16),    \
                 PYDENSE_EIGHT(d, 24), PYDENSE_EIGHT(d, 32), PYDENSE_EIGHT(d, 40),  \
                 PYDENSE_EIGHT(d, 48), PYDENSE_EIGHT(d, 56)                         \
               : "l"(a), "l"(b))

// D += A B of 64 x 128 and depth 16; B lies as [128, 16]. D's rows and columns over lanes are those
// of mma_m16n8k16, sixteen times side by side, with 16 rows for each warp.
template <class T>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (__is_same(T, __half)) {
    PYDENSE_WGMMA("f16.f16");
  } else {
    static_assert(__is_same(T, __nv_bfloat16));
    PYDENSE_WGMMA("bf16.bf16");
  }
}
#undef PYDENSE_WGMMA
#undef PYDENSE_EIGHT

// Before the first product, and after registers of D were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `Pending` groups are under way.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// After wgmma_wait: to the compiler D is there once a product is issued, so that it could read D
// before the wait.
__device__ __forceinline__ void wgmma_settle(float (&d)[64]) {
#pragma unroll
  for (float& x : d) {
    asm volatile("" : "+f"(x)::"memory");
  }
}

// Registers of the threads of four warps: fewer for those that copy, more for those that multiply.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace pydense
