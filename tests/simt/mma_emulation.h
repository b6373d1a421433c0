// SPDX-License-Identifier: Apache-2.0
// mma.sync, ldmatrix and cp.async as the PTX manual describes them, for common/mma.cuh. Not yet
// compared with a GPU.
#pragma once

#include "simt.h"

namespace simt {

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_HERE) {
  uint32_t all_a[32][4];
  uint32_t all_b[32][2];
  warp_gather(WarpKind::kMmaA, 0, ~0U, a, all_a, sizeof(a), place);
  warp_gather(WarpKind::kMmaB, 0, ~0U, b, all_b, sizeof(b), place);
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

inline void load_matrix(uint32_t* r, const void* row, unsigned tiles, bool transposed, SIMT_HERE) {
  const void* rows[32];
  warp_gather(WarpKind::kLoadMatrix, tiles * 2 + (transposed ? 1 : 0), ~0U, &row, rows, sizeof(row),
              place);
  if (self->lane < tiles * 8 && reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("ldmatrix: the address of a row must be a multiple of 16 bytes");
  }
  const unsigned group = self->lane / 4;
  const unsigned member = self->lane % 4;
  for (unsigned tile = 0; tile < tiles; ++tile) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned i = transposed ? 2 * member + e : group;
      const unsigned j = transposed ? group : 2 * member + e;
      pair[e] = static_cast<const uint16_t*>(rows[tile * 8 + i])[j];
    }
    r[tile] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// With an odd seed a copy lands at once, with an even one as late as the kernel allows: at the wait
// that asks for it.
void copy_async_16(void* to, const void* from, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

}  // namespace simt
