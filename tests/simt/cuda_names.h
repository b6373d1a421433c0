// SPDX-License-Identifier: Apache-2.0
// CUDA's names for kernels under the shim: qualifiers, indices, barriers, warp operations, atomics,
// intrinsics. What is not here, kernels may not use (csrc/README.md).
#pragma once

#include <math.h>  // NOLINT(modernize-deprecated-headers): the overloads in the global namespace

#include <cmath>

#include "simt.h"

#undef __shared__
#ifdef SIMT_ASAN
#define __shared__ static  // AddressSanitizer puts red zones round a global
#else
#define __shared__ \
  static thread_local  // the program's thread-local block is then the shared memory
#endif
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __device__
#define __device__
#undef __global__
#define __global__
#undef __constant__
#define __constant__ static const
#undef __forceinline__
#define __forceinline__ inline

#define threadIdx (::simt::self->thread)
#define blockIdx (::simt::self->block)
#define blockDim (::simt::self->block_size)
#define gridDim (::simt::self->grid_size)
#define warpSize 32

// ---- barriers and warp operations --------------------------------------------------------------
inline void __syncthreads(SIMT_HERE) { simt::block_barrier(simt::Vote::kCount, false, place); }
inline int __syncthreads_count(int predicate, SIMT_HERE) {
  return simt::block_barrier(simt::Vote::kCount, predicate != 0, place);
}
inline int __syncthreads_and(int predicate, SIMT_HERE) {
  return simt::block_barrier(simt::Vote::kAnd, predicate != 0, place);
}
inline int __syncthreads_or(int predicate, SIMT_HERE) {
  return simt::block_barrier(simt::Vote::kOr, predicate != 0, place);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFU, SIMT_HERE) {
  simt::warp_gather(simt::WarpKind::kSync, 0, mask, nullptr, nullptr, 0, place);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::Shuffle::kIndex, mask, value, lane, width, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::Shuffle::kUp, mask, value, static_cast<int>(delta), width, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::Shuffle::kDown, mask, value, static_cast<int>(delta), width, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::Shuffle::kXor, mask, value, lanes, width, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  int all[32];
  const unsigned present =
      simt::warp_gather(simt::WarpKind::kBallot, 0, mask, &predicate, all, sizeof(int), place);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    votes |= static_cast<unsigned>((present >> lane & 1) != 0 && all[lane] != 0) << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return __ballot_sync(mask, predicate == 0, place) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_HERE) {
  T all[32];
  const unsigned present =
      simt::warp_gather(simt::WarpKind::kMatch, 0, mask, &value, all, sizeof(T), place);
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const bool equal =
        (present >> lane & 1) != 0 && !__builtin_memcmp(&all[lane], &value, sizeof(T));
    same |= static_cast<unsigned>(equal) << lane;
  }
  return same;
}
// A fence orders the accesses of one thread; the race check asks for atomics or barriers anyway.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned /*nanoseconds*/) { simt::yield_now(); }
[[noreturn]] inline void __trap() { simt::fail("__trap()"); }

// ---- memory -------------------------------------------------------------------------------------
template <class T>
T __ldg(const T* from) {
  return simt::load_value(from);
}
template <class T>
T __ldcg(const T* from) {
  return simt::load_value(from);
}
template <class T>
T __ldcs(const T* from) {
  return simt::load_value(from);
}
template <class T>
void __stcs(T* to, std::common_type_t<T> value) {
  if constexpr (std::is_scalar_v<T>) {
    *to = value;
  } else {
    simt::store(to, &value, sizeof(T));
  }
}

// ---- atomics ------------------------------------------------------------------------------------
#define SIMT_ATOMIC(name, result)                                           \
  template <class T>                                                        \
  T name(T* address, std::common_type_t<T> value) {                         \
    return simt::read_modify_write(address, [=](T old) { return result; }); \
  }
SIMT_ATOMIC(atomicAdd, static_cast<T>(old + value))
SIMT_ATOMIC(atomicSub, static_cast<T>(old - value))
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicAnd, static_cast<T>(old& value))
SIMT_ATOMIC(atomicOr, static_cast<T>(old | value))
SIMT_ATOMIC(atomicXor, static_cast<T>(old ^ value))
#undef SIMT_ATOMIC
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return simt::read_modify_write(address, [=](T /*old*/) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return simt::read_modify_write(address, [=](T old) { return old == expected ? value : old; });
}

// ---- arithmetic ---------------------------------------------------------------------------------
// The _rn forms keep nvcc from forming a fused multiply-add; here -ffp-contract=off does.
#define SIMT_ROUNDED(type, prefix)                             \
  inline type prefix##add_rn(type a, type b) { return a + b; } \
  inline type prefix##sub_rn(type a, type b) { return a - b; } \
  inline type prefix##mul_rn(type a, type b) { return a * b; } \
  inline type prefix##div_rn(type a, type b) { return a / b; } \
  inline type prefix##sqrt_rn(type a) { return std::sqrt(a); } \
  inline type prefix##rcp_rn(type a) { return type{1} / a; }
SIMT_ROUNDED(float, __f)
SIMT_ROUNDED(double, __d)
#undef SIMT_ROUNDED
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0F / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0F / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0F ? (x < 1.0F ? x : 1.0F) : 0.0F; }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
