// SPDX-License-Identifier: Apache-2.0
// The emulation of wgmma: products of whole numbers, which are exact, with operands laid out by
// tables worked out from the PTX manual's rules for swizzling, and mistakes that it notices.
#include "common/mma.cuh"
#include "common/wgmma.cuh"
#include "driver.h"

namespace {

enum Fault {
  kNone,
  kNoFence,
  kNoFenceAfterCommit,
  kNoWait,
  kChangesA,
  kChangesB,
  kOneWarpElsewhere,
  kMisaligned,
  kOutside,
  kNotShown,
  kNoBarrier
};

// Where the vectors of 16 bytes of eight rows lie within their rows: figures of the swizzling
// modes.
constexpr int kPlaces32[8][2] = {{0, 1}, {0, 1}, {0, 1}, {0, 1}, {1, 0}, {1, 0}, {1, 0}, {1, 0}};
constexpr int kPlaces64[8][4] = {{0, 1, 2, 3}, {0, 1, 2, 3}, {1, 0, 3, 2}, {1, 0, 3, 2},
                                 {2, 3, 0, 1}, {2, 3, 0, 1}, {3, 2, 1, 0}, {3, 2, 1, 0}};
constexpr int kPlaces128[8][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6},
                                  {2, 3, 0, 1, 6, 7, 4, 5}, {3, 2, 1, 0, 7, 6, 5, 4},
                                  {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
                                  {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};
template <int kRowBytes>
int place_of(int row, int vector) {
  if constexpr (kRowBytes == 32) {
    return kPlaces32[row % 8][vector];
  } else if constexpr (kRowBytes == 64) {
    return kPlaces64[row % 8][vector];
  } else {
    return kPlaces128[row % 8][vector];
  }
}

// Two times four warps, of which the second multiply the next 64 rows of A. D begins with 1.
// T: __nv_bfloat16, or float for TF32.
template <Fault F, class T, int kRowBytes, int kGroups>
__global__ void __launch_bounds__(256) product_kernel(const float* a, const float* b, float* d) {
  constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  constexpr int kStep = 32 / static_cast<int>(sizeof(T));
  constexpr int kSteps = kDepth / kStep;
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  constexpr int kVectors = kRowBytes / 16;
  PYDENSE_DYNAMIC_SHARED(unsigned char, bytes);
  unsigned char* const keys = bytes + (1024 - pydense::shared_address(bytes) % 1024) % 1024 +
                              (F == kMisaligned ? 16 * 8 : 0);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int first = thread / 32 * 16 + lane / 4;  // row of A
  for (int i = thread; i < 8 * kGroups * kVectors; i += 256) {
    const int row = i / kVectors;
    pydense::Vector<T, kVector> v;
    for (int e = 0; e < kVector; ++e) {
      const float x = b[row * kDepth + i % kVectors * kVector + e];
      if constexpr (sizeof(T) == 2) {
        v[e] = pydense::from_accumulate<T>(x);
      } else {  // the lower bits do not count
        v[e] = __uint_as_float(__float_as_uint(x) | 0x1FFFU);
      }
    }
    pydense::store_vector(
        reinterpret_cast<T*>(keys + row * kRowBytes + place_of<kRowBytes>(row, i % kVectors) * 16),
        v);
  }
  if (F != kNotShown) {
    pydense::show_to_products();
  }
  if (F != kNoBarrier) {
    __syncthreads();
  }
  uint32_t registers[kSteps][4];
  for (int s = 0; s < kSteps; ++s) {
    for (int r = 0; r < 4; ++r) {
      const float* const row = a + (first + r % 2 * 8) * kDepth + s * kStep;
      if constexpr (sizeof(T) == 2) {
        const int k = lane % 4 * 2 + r / 2 * 8;
        registers[s][r] = pydense::bfloat16_pair(row[k], row[k + 1]);
      } else {
        registers[s][r] = __float_as_uint(row[lane % 4 + r / 2 * 4]) | 0x1FFFU;
      }
    }
  }
  float sums[kGroups][4];
  for (auto& group : sums) {
    for (float& sum : group) {
      sum = 1;
    }
  }
  if (F != kNoFence) {
    pydense::wgmma_fence();
  }
  uint64_t descriptor = pydense::matrix_descriptor<kRowBytes>(keys);
  if (F == kOneWarpElsewhere && thread / 32 == 6) {
    descriptor += pydense::matrix_descriptor_step(8 * kRowBytes);
  }
  if (F == kOutside) {
    descriptor += pydense::matrix_descriptor_step(64 << 10);
  }
  for (int s = 0; s < kSteps; ++s) {
    const uint64_t at = descriptor + pydense::matrix_descriptor_step(32 * s);
    if constexpr (sizeof(T) == 2) {
      pydense::wgmma_m64n64k16_bf16(sums, registers[s], at);
    } else {
      pydense::wgmma_k8_tf32(sums, registers[s], at);
    }
    if (F == kNoFenceAfterCommit) {
      pydense::wgmma_commit();
    }
  }
  pydense::wgmma_commit();
  if (F == kChangesA) {
    registers[0][0] ^= 1;
  }
  if (F == kChangesB) {
    __syncthreads();
    pydense::store_vector(reinterpret_cast<T*>(keys), pydense::Vector<T, kVector>{});
    pydense::show_to_products();
  }
  if (F == kNoWait) {
    pydense::wgmma_wait<1>();
  } else {
    pydense::wgmma_wait<0>();
  }
  pydense::wgmma_settle(sums);
  for (int g = 0; g < kGroups; ++g) {
    for (int e = 0; e < 4; ++e) {
      d[(first + e / 2 * 8) * 8 * kGroups + 8 * g + lane % 4 * 2 + e % 2] = sums[g][e];
    }
  }
}

template <Fault F, class T, int kRowBytes, int kGroups>
void product() {
  constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  constexpr int kColumns = 8 * kGroups;
  simt::Buffer<float> a(128 * kDepth, "a");
  simt::Buffer<float> b(kColumns * kDepth, "b");
  simt::Buffer<float> d(128 * kColumns, "d");
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = static_cast<float>(i * 7919 % 31) - 15;
  }
  for (size_t i = 0; i < b.size(); ++i) {
    b[i] = static_cast<float>(i * 104729 % 29) - 14;
  }
  const pydense::LaunchConfig config = {dim3(1), dim3(256), kColumns * kRowBytes + 2048, 0,
                                        nullptr};
  PYDENSE_LAUNCH((product_kernel<F, T, kRowBytes, kGroups>), config, a.data(), b.data(), d.data());
  std::vector<double> expected(d.size(), 1);
  for (size_t i = 0; i < expected.size(); ++i) {
    for (size_t k = 0; k < kDepth; ++k) {
      expected[i] += static_cast<double>(a[i / kColumns * kDepth + k]) *
                     static_cast<double>(b[i % kColumns * kDepth + k]);
    }
  }
  simt::expect_close(d, expected, 0, 0);
}

template <Fault F>
bool caught() {
  return simt::is_caught(product<F, __nv_bfloat16, 64, 8>) &&
         simt::is_caught(product<F, float, 128, 3>);
}
void mistakes() {
  SIMT_EXPECT(!caught<kNone>());
  SIMT_EXPECT(caught<kNoFence>());
  SIMT_EXPECT(caught<kNoFenceAfterCommit>());
  SIMT_EXPECT(caught<kNoWait>());
  SIMT_EXPECT(caught<kChangesA>());
  SIMT_EXPECT(caught<kChangesB>());
  SIMT_EXPECT(caught<kOneWarpElsewhere>());
  SIMT_EXPECT(caught<kMisaligned>());
  SIMT_EXPECT(caught<kOutside>());
  if (simt::this_build() == simt::kTrace) {
    SIMT_EXPECT(caught<kNotShown>());
    SIMT_EXPECT(caught<kNoBarrier>());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int status =
      simt::run_cases(argc, argv,
                      {
                          {"bfloat16, rows of 32 bytes", product<kNone, __nv_bfloat16, 32, 8>},
                          {"bfloat16, rows of 64 bytes", product<kNone, __nv_bfloat16, 64, 8>},
                          {"bfloat16, rows of 128 bytes", product<kNone, __nv_bfloat16, 128, 8>},
                          {"TF32, 8 columns", product<kNone, float, 128, 1>},
                          {"TF32, 24 columns", product<kNone, float, 128, 3>},
                          {"TF32, 48 columns", product<kNone, float, 128, 6>},
                      });
  mistakes();
  std::printf("%d planted mistakes not found\n", simt::failure_count());
  return status != 0 || simt::failure_count() != 0 ? 1 : 0;
}
