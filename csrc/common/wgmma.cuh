// SPDX-License-Identifier: Apache-2.0
// Matrix products of four warps, of compute capability 9.0 alone (sm_90a): PTX under nvcc,
// emulation under the shim, which has no product with both operands in shared memory. Products run
// beside the threads that issue them, and read registers and shared memory until those have waited
// for them.
#pragma once

#include "common/cuda.cuh"

#ifdef PYDENSE_SIMT
#include "wgmma_emulation.h"
#endif

namespace pydense {

__device__ __forceinline__ uint32_t shared_address(const void* at) {
#ifdef PYDENSE_SIMT
  return ::simt::shared_address(at);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
#endif
}

// An operand in shared memory: rows of kRowBytes (32, 64, 128), of which vectors of 16 bytes are
// swizzled as copies of boxes leave them: vector v of row r is where v ^ r / (128 / kRowBytes)
// would be, within the row. Eight rows after each other; the first one at a multiple of 8
// kRowBytes.
template <int kRowBytes = 128>
__device__ __forceinline__ uint64_t matrix_descriptor(const void* at) {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
  constexpr uint64_t kEightRows = 8 * kRowBytes >> 4;
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  return (shared_address(at) & 0x3FFFFU) >> 4 | uint64_t{1} << 16 | kEightRows << 32 |
         kSwizzle << 62;
}
// Of elements further on in the rows, or further rows.
__device__ __forceinline__ uint64_t matrix_descriptor_step(int bytes) {
  return static_cast<uint64_t>(bytes >> 4);
}

#ifndef PYDENSE_SIMT
// The registers of a product as operands of one instruction, which cannot be written as a loop.
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
#endif

#ifndef PYDENSE_SIMT
#define PYDENSE_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PYDENSE_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#endif

// D += A B of 64 x 64 and depth 16, of __nv_bfloat16; A in registers, B lies as [64, 16]. Rows and
// columns of D over lanes are those of mma_m16n8k16, eight times side by side, with 16 rows for
// each warp; A is as there.
__device__ __forceinline__ void wgmma_m64n64k16_bf16(float (&d)[8][4], const uint32_t (&a)[4],
                                                     uint64_t b) {
#ifdef PYDENSE_SIMT
  ::simt::wgmma_bf16(d, a, b);
#else
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "{%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
      : PYDENSE_FOUR(0), PYDENSE_FOUR(1), PYDENSE_FOUR(2), PYDENSE_FOUR(3), PYDENSE_FOUR(4),
        PYDENSE_FOUR(5), PYDENSE_FOUR(6), PYDENSE_FOUR(7)
      : PYDENSE_A, "l"(b));
#endif
}

// D += A B of 64 x 8 kGroups and depth 8, of float: TF32, to which operands are rounded before. A
// is as for mma_m16n8k8; B lies as [8 kGroups, 8].
template <int kGroups>
__device__ __forceinline__ void wgmma_k8_tf32(float (&d)[kGroups][4], const uint32_t (&a)[4],
                                              uint64_t b) {
#ifdef PYDENSE_SIMT
  ::simt::wgmma_tf32(d, a, b);
#else
  if constexpr (kGroups == 1) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1;"
        : PYDENSE_FOUR(0)
        : PYDENSE_A, "l"(b));
  } else if constexpr (kGroups == 3) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n24k8.f32.tf32.tf32 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}, {%12,%13,%14,%15}, %16, 1, 1, 1;"
        : PYDENSE_FOUR(0), PYDENSE_FOUR(1), PYDENSE_FOUR(2)
        : PYDENSE_A, "l"(b));
  } else {
    static_assert(kGroups == 6);
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n48k8.f32.tf32.tf32 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, "
        "{%24,%25,%26,%27}, %28, 1, 1, 1;"
        : PYDENSE_FOUR(0), PYDENSE_FOUR(1), PYDENSE_FOUR(2), PYDENSE_FOUR(3), PYDENSE_FOUR(4),
          PYDENSE_FOUR(5)
        : PYDENSE_A, "l"(b));
  }
#endif
}
#ifndef PYDENSE_SIMT
#undef PYDENSE_FOUR
#undef PYDENSE_A
#endif

// Before the first product, and after registers of A or D were written.
__device__ __forceinline__ void wgmma_fence() {
#ifdef PYDENSE_SIMT
  ::simt::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef PYDENSE_SIMT
  ::simt::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most `Pending` groups are under way.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef PYDENSE_SIMT
  ::simt::wgmma_wait(Pending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}
// After wgmma_wait: to the compiler D is there once a product is issued, so that it could read D
// before the wait.
__device__ __forceinline__ void wgmma_settle(float& x) {
#ifdef PYDENSE_SIMT
  static_cast<void>(x);
#else
  asm volatile("" : "+f"(x)::"memory");
#endif
}
template <class T, int kCount>
__device__ __forceinline__ void wgmma_settle(T (&d)[kCount]) {
#pragma unroll
  for (T& x : d) {
    wgmma_settle(x);
  }
}

// What a thread wrote to shared memory, or copied there, products may read once the threads have
// met at a barrier after this.
__device__ __forceinline__ void show_to_products() {
#ifdef PYDENSE_SIMT
  ::simt::show_to_products();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace pydense
