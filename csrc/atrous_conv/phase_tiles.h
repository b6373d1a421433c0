// SPDX-License-Identifier: Apache-2.0
// Tiles of the phase grids of an axis, in one order for all of them: u = (tile of its grid) * rate
// + phase. What tiles that follow each other read, and write, lies side by side in runs of `rate`.
#pragma once

#include <cstdint>

#include "common/hd.h"

namespace pydense {

// How many tiles of `tile` outputs the grids of an axis have together.
PYDENSE_HD int64_t phase_tiles(int64_t size, int64_t rate, int64_t tile) {
  if (rate >= size) {
    return size;
  }
  const int64_t span = rate * tile;  // of the tiles that begin side by side
  const int64_t whole = (size - 1) / span;
  const int64_t rest = size - whole * span;
  return whole * rate + (rest < rate ? rest : rate);
}

// The first output of tile u.
PYDENSE_HD int64_t phase_tile_at(int64_t u, int64_t rate, int64_t tile) {
  return u / rate * rate * tile + u % rate;
}
// For GPUs, which divide 32 bits several times faster.
PYDENSE_HD uint32_t phase_tile_at(uint32_t u, uint32_t rate, uint32_t tile) {
  return u / rate * rate * tile + u % rate;
}

// The u-th place of an axis in the order of phases: 0, rate, 2 rate, ..., 1, 1 + rate, ...
PYDENSE_HD uint32_t phase_order_at(uint32_t u, uint32_t size, uint32_t rate) {
  const uint32_t most = (size - 1) / rate + 1;     // places of a phase
  const uint32_t many = size - (most - 1) * rate;  // phases that have so many
  const bool first = u < many * most;
  const uint32_t left = first ? u : u - many * most;
  const uint32_t each = first ? most : most - 1;
  return (first ? 0 : many) + left / each + left % each * rate;
}

}  // namespace pydense
