// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warp, and copies to shared memory that run beside arithmetic (sm_80 and
// later): PTX under nvcc, emulation under the shim.
#pragma once

#include "common/cuda.cuh"

#ifdef PYDENSE_SIMT
#include "mma_emulation.h"
#endif

namespace pydense {

// D += A B for a 16 x 8 tile and depth 16, of __half or __nv_bfloat16 with sums in float. Where the
// elements lie over the lanes is in the PTX manual, "Matrix Fragments for mma.m16n8k16".
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#ifdef PYDENSE_SIMT
  ::simt::mma_m16n8k16<T>(d, a, b);
#else
  if constexpr (__is_same(T, __half)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(__is_same(T, __nv_bfloat16));
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// D = A B + C, of __nv_bfloat16.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef PYDENSE_SIMT
  const float sums[4] = {c[0], c[1], c[2], c[3]};
  std::memcpy(d, sums, sizeof(sums));
  ::simt::mma_m16n8k16<__nv_bfloat16>(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
#endif
}

// D += A B with depth 8, of float: TF32, to which operands are rounded before.
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#ifdef PYDENSE_SIMT
  ::simt::mma_m16n8k8(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// The bits of a float, rounded to TF32 (10 bits of mantissa; ties away from zero).
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
#ifdef PYDENSE_SIMT
  return ::simt::round_to_tf32(bits);
#else
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0,%1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#endif
}

// Two numbers as a pair of bfloat16, the first in the lower half.
__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  std::memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ float bfloat16_value(uint16_t bits) {
  return __uint_as_float(uint32_t{bits} << 16);
}
// x as a sum of numbers of bfloat16, each of which takes 8 bits more of it.
template <int kParts>
__device__ __forceinline__ void split_bfloat16(float x, uint16_t (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    parts[i] = static_cast<uint16_t>(bfloat16_pair(x, 0));
    x -= bfloat16_value(parts[i]);
  }
}

// Four 8 x 8 tiles of 16-bit elements from shared memory; each lane brings the address of a row,
// a multiple of 16 bytes.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef PYDENSE_SIMT
  ::simt::load_matrix(r, row, 4, false);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// Two tiles, transposed; the addresses of lanes 0 to 15 count.
__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
#ifdef PYDENSE_SIMT
  ::simt::load_matrix(r, row, 2, true);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
#endif
}

// Four tiles, transposed.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
#ifdef PYDENSE_SIMT
  ::simt::load_matrix(r, row, 4, true);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

// 16 bytes from global to shared memory, or zeros. Seen after the wait for their group.
__device__ __forceinline__ void copy_async_16(void* to_shared, const void* from, bool valid) {
#ifdef PYDENSE_SIMT
  ::simt::copy_async_16(to_shared, from, valid);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#ifdef PYDENSE_SIMT
  ::simt::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef PYDENSE_SIMT
  ::simt::copy_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace pydense
