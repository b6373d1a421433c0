// SPDX-License-Identifier: Apache-2.0
#include "mma_emulation.h"

#include <cstring>

namespace simt {

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  uint32_t all_a[32][4];
  uint32_t all_b[32][2];
  warp_gather(WarpKind::kMmaA, 0, ~0U, a, all_a, sizeof(a), place);
  warp_gather(WarpKind::kMmaB, 0, ~0U, b, all_b, sizeof(b), place);
  if (observer != nullptr && self->lane == 0) {
    observer->matrix_product();
  }
  const auto element = [](uint32_t pair, unsigned high) {
    return static_cast<float>(
        __builtin_bit_cast(T, static_cast<uint16_t>(high != 0 ? pair >> 16 : pair)));
  };
  const unsigned group = self->lane / 4;
  const unsigned member = self->lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + (i >= 2 ? 8 : 0);
    const unsigned column = 2 * member + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned upper = k >= 8 ? 1 : 0;
      const float x =
          element(all_a[row % 8 * 4 + k % 8 / 2][(row >= 8 ? 1 : 0) + 2 * upper], k % 2);
      const float y = element(all_b[column * 4 + k % 8 / 2][upper], k % 2);
      sum += x * y;
    }
    d[i] += sum;
  }
}
template void mma_m16n8k16<__half>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2],
                                   Place);
template void mma_m16n8k16<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4],
                                          const uint32_t (&)[2], Place);

void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  uint32_t all_a[32][4];
  uint32_t all_b[32][2];
  warp_gather(WarpKind::kMmaA, 1, ~0U, a, all_a, sizeof(a), place);
  warp_gather(WarpKind::kMmaB, 1, ~0U, b, all_b, sizeof(b), place);
  if (observer != nullptr && self->lane == 0) {
    observer->matrix_product();
  }
  const auto element = [](uint32_t bits) { return __builtin_bit_cast(float, bits & ~0x1FFFU); };
  const unsigned group = self->lane / 4;
  const unsigned member = self->lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + (i >= 2 ? 8 : 0);
    const unsigned column = 2 * member + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 8; ++k) {
      const unsigned upper = k / 4;
      sum += element(all_a[row % 8 * 4 + k % 4][row / 8 + 2 * upper]) *
             element(all_b[column * 4 + k % 4][upper]);
    }
    d[i] += sum;
  }
}

uint32_t round_to_tf32(uint32_t bits) {
  // Infinities and NaN stay what they are.
  return (bits & 0x7F800000U) == 0x7F800000U ? bits : (bits + 0x1000U) & ~0x1FFFU;
}

void load_matrix(uint32_t* r, const void* row, unsigned tiles, bool transposed, Place place) {
  const void* const from = __builtin_return_address(0);
  const unsigned detail = tiles * 2 + (transposed ? 1 : 0);
  warp_gather(WarpKind::kLoadMatrix, detail, ~0U, nullptr, nullptr, 0, place);
  // A lane reads the row whose address it brings, as one access.
  uint16_t own[8] = {};
  if (self->lane < tiles * 8) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
      fail("ldmatrix: the address of a row must be a multiple of 16 bytes");
    }
    if (observer != nullptr) {
      observer->access(row, sizeof(own), false, false, from);
    }
    std::memcpy(own, row, sizeof(own));
  }
  uint16_t rows[32][8];
  warp_gather(WarpKind::kLoadMatrix, detail, ~0U, own, rows, sizeof(own), place);
  const unsigned group = self->lane / 4;
  const unsigned member = self->lane % 4;
  for (unsigned tile = 0; tile < tiles; ++tile) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned i = transposed ? 2 * member + e : group;
      const unsigned j = transposed ? group : 2 * member + e;
      pair[e] = rows[tile * 8 + i][j];
    }
    r[tile] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

}  // namespace simt
