// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>

#include "common/gemm/gemm.h"
#include "selftest/selftest.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#define PYDENSE_STRING_OF(name) #name
#define PYDENSE_STRING(name) PYDENSE_STRING_OF(name)

namespace pydense::PYDENSE_ISA {
namespace {

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
// One tile product on small whole numbers, exact in bfloat16: c = a b with a = 1, b = 2 everywhere.
void check_tiles() {
  struct alignas(64) TileConfig {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config{};
  constexpr int kRows = 16;
  constexpr int kDepth = 32;
  config.palette = 1;
  for (int tile = 0; tile < 3; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = kRows;
  }
  alignas(64) uint16_t a[kRows * kDepth];
  alignas(64) uint16_t b[kRows * kDepth];
  alignas(64) float c[kRows * 16];
  std::fill(std::begin(a), std::end(a), uint16_t{0x3F80});  // 1 in bfloat16
  std::fill(std::begin(b), std::end(b), uint16_t{0x4000});  // 2 in bfloat16
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 64);
  _tile_release();
  for (const float value : c) {
    if (value != 2.0f * kDepth) {
      throw std::runtime_error("selftest: AMX tile product is wrong");
    }
  }
}
#else
void check_tiles() {}
#endif

#if defined(__AVX512BF16__)
// Likewise one product of pairs.
void check_pairs() {
  constexpr int64_t kDepth = 32;
  constexpr auto kColumns = kGemmColumns<BFloat16>;
  BFloat16 a[kDepth];
  BFloat16 b[kDepth * kColumns];
  float c[kColumns];
  std::fill(std::begin(a), std::end(a), BFloat16{0x3F80});
  std::fill(std::begin(b), std::end(b), BFloat16{0x4000});
  gemm_block<BFloat16, 1, true>(kDepth, a, 0, b, c, kColumns, false, nullptr);
  for (const float value : c) {
    if (value != 2.0f * kDepth) {
      throw std::runtime_error("selftest: product of bfloat16 pairs is wrong");
    }
  }
}
#else
void check_pairs() {}
#endif

void selftest_cpu(const SelftestArgs& args, ParallelFor parallel_for) {
  check_tiles();
  check_pairs();
  using Vec = FloatVec<kNativeLanes>;
  constexpr int64_t kChunk = 4096;
  parallel_tasks(parallel_for, ceil_div(args.n, kChunk), [&](int64_t task) {
    int64_t i = task * kChunk;
    const int64_t end = std::min(i + kChunk, args.n);
    for (; i + kNativeLanes <= end; i += kNativeLanes) {
      store(args.y + i, load<Vec>(args.x + i) * 2.0f + 1.0f);
    }
    for (; i < end; ++i) {
      args.y[i] = args.x[i] * 2.0f + 1.0f;
    }
  });
}

}  // namespace

extern const SelftestTable kSelftestTable;
const SelftestTable kSelftestTable = {selftest_cpu, PYDENSE_STRING(PYDENSE_ISA)};

}  // namespace pydense::PYDENSE_ISA
