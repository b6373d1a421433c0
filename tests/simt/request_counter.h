// SPDX-License-Identifier: Apache-2.0
// Joins the accesses of the lanes of a warp to requests: the n-th time that lanes execute an
// instruction is one request.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "counters.h"

namespace simt {

class RequestCounter {
 public:
  struct Line {
    bool shared = false;
    bool write = false;
    uint64_t requests = 0;
    uint64_t units = 0;
    uint64_t ideal = 0;
  };

  void access(const void* from, unsigned thread, uintptr_t address, size_t bytes, bool shared,
              bool write);
  void basic_block(const void* from, unsigned thread);
  void matrix_product() { ++counts_.matrix_products; }
  void block_begins(size_t dynamic_shared);
  void block_ends();
  void launch_ends();

  uint64_t launches() const { return launches_; }
  const Counts& counts() const { return counts_; }
  const std::unordered_map<const void*, Line>& lines() const { return lines_; }
  // How often warps came to a basic block, by its address.
  const std::unordered_map<const void*, uint64_t>& basic_blocks() const { return block_totals_; }

 private:
  struct Part {
    uintptr_t address;
    uint8_t bytes;
    uint8_t lane;
  };
  struct Request {
    const void* from;
    bool shared;
    bool write;
    std::vector<Part> parts;
  };
  void finish(const Request& request);

  uint64_t launches_ = 0;
  Counts counts_;
  std::unordered_map<const void*, Line> lines_;
  std::unordered_map<uint64_t, uint32_t> times_;    // (instruction, thread) -> executions
  std::unordered_map<uint64_t, Request> requests_;  // of the running block
  std::unordered_set<uintptr_t> read_, written_;    // sectors of the launch
  std::unordered_map<const void*, std::vector<uint32_t>> block_times_;  // by thread
  std::unordered_map<const void*, uint64_t> block_totals_;
};

}  // namespace simt
