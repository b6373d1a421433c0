// SPDX-License-Identifier: Apache-2.0
// Copies of boxes of tensors to shared memory, barriers that wait for them, and registers that
// warps give each other: of compute capability 9.0 alone (sm_90a). The shim has none of it.
#pragma once

#include <cuda.h>

#include "common/wgmma.cuh"

namespace pydense {

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

// ---- registers
// -----------------------------------------------------------------------------------

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
