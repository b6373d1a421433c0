// SPDX-License-Identifier: Apache-2.0
// What a kernel includes, and all it includes of CUDA: the toolkit's headers under nvcc, the shim
// that runs the same source on the CPU (tests/simt) where PYDENSE_SIMT is defined.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/hd.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Shared memory of LaunchConfig::shared_bytes, as `type* name`.
#define PYDENSE_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char pydense_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(pydense_dynamic_shared)
#elif defined(PYDENSE_SIMT)
#include "cuda_names.h"
#define PYDENSE_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::simt::dynamic_shared())
#else
#error "kernels are compiled by nvcc, or by a host compiler with PYDENSE_SIMT"
#endif

namespace pydense {

// 16-bit types are computed with in float.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// What T is summed in: double for double, float for the rest.
template <class T>
struct AccumulateOf {
  using Type = float;
};
template <>
struct AccumulateOf<double> {
  using Type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::Type;

template <class T>
__device__ __forceinline__ Accumulate<T> to_accumulate(T x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return x;
  } else {
    return to_float(x);
  }
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_accumulate(Accumulate<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_accumulate<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_accumulate<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <class T>
__device__ __forceinline__ T from_float(float x) {
  return from_accumulate<T>(x);
}

// N neighbours in memory, moved in one access. The address must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T values[N];
  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* from) {
#ifdef PYDENSE_SIMT
  Vector<T, N> v;
  ::simt::load(&v, from, sizeof(v));
  return v;
#else
  return *reinterpret_cast<const Vector<T, N>*>(from);
#endif
}

template <class T, int N>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, N>& v) {
#ifdef PYDENSE_SIMT
  ::simt::store(to, &v, sizeof(v));
#else
  *reinterpret_cast<Vector<T, N>*>(to) = v;
#endif
}

// The same to global memory, in one instruction: nvcc takes some vectors apart.
template <class T, int N>
__device__ __forceinline__ void store_global_vector(T* to, const Vector<T, N>& v) {
#ifndef PYDENSE_SIMT
  if constexpr (sizeof(v) == 16) {
    uint32_t word[4];
    std::memcpy(word, &v, sizeof(v));
    asm volatile("st.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
    return;
  }
  if constexpr (sizeof(v) == 8) {
    uint32_t word[2];
    std::memcpy(word, &v, sizeof(v));
    asm volatile("st.global.v2.u32 [%0],{%1,%2};" ::"l"(__cvta_generic_to_global(to)), "r"(word[0]),
                 "r"(word[1])
                 : "memory");
    return;
  }
#endif
  store_vector(to, v);
}

// x, of which the compiler knows nothing any more: what is made of it in a loop is made there in
// every turn, instead of once in registers that the loop has other use for.
__device__ __forceinline__ int opaque(int x) {
#ifndef PYDENSE_SIMT
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// A read of memory that other threads write atomically during the launch.
template <class T>
__device__ __forceinline__ T load_relaxed(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#ifdef PYDENSE_SIMT
  return ::simt::load_relaxed(from);
#else
  return *static_cast<const volatile T*>(from);
#endif
}

}  // namespace pydense
