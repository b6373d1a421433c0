// SPDX-License-Identifier: Apache-2.0
// What a launch asks of memory, counted access by access in the trace build: for limits in the
// tests and for predictions of the time on a GPU.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace simt {

// A request is one access instruction of one warp.
struct Counts {
  uint64_t requests = 0;
  uint64_t sectors = 0;        // of 32 bytes, over all requests for global memory
  uint64_t ideal_sectors = 0;  // if the lanes' bytes lay side by side
  uint64_t moved_bytes = 0;    // distinct sectors of the launch: what caches cannot save
  uint64_t shared_requests = 0;
  uint64_t wavefronts = 0;        // passes that the requests for shared memory take
  uint64_t ideal_wavefronts = 0;  // without bank conflicts
  uint64_t matrix_products = 0;   // of warps, 16 x 8 with depth 16
  uint64_t dynamic_shared = 0;    // bytes of a block, the most of all launches
};

// One line of the source.
struct LineCounts {
  std::string line;
  bool shared = false;
  bool write = false;
  uint64_t requests = 0;
  uint64_t units = 0;  // sectors or wavefronts
  uint64_t ideal = 0;
};

// How often warps came to a basic block of the program, by the address after its call of the trace.
struct BlockCounts {
  uintptr_t address = 0;  // within the program's file
  uint64_t warps = 0;
};

// Of all launches of one kernel.
struct Counted {
  uint64_t launches = 0;
  Counts counts;
  std::vector<LineCounts> lines;
  std::vector<BlockCounts> blocks;
};

// In the trace build: counts from now on, without preemption. In the others nothing is counted.
bool counting_is_possible();
void start_counting();
// By the kernel's name without template arguments.
std::map<std::string, Counted> stop_counting(bool with_lines);

}  // namespace simt
