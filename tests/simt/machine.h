// SPDX-License-Identifier: Apache-2.0
// The state of a launch, for the files of the shim alone: scheduler.cpp decides who runs,
// kernel_calls.cpp is what kernels call.
#pragma once

#include <array>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kGuardBytes = 4096;  // below each stack, without access

enum class State { kReady, kAtBarrier, kInWarpOperation, kDone };

struct WarpOperation {
  unsigned mask = 0;
  unsigned present = 0;
  unsigned to_leave = 0;  // lanes that have not read the result yet
  unsigned detail = 0;
  WarpKind kind = WarpKind::kSync;
  size_t bytes = 0;
  bool open = false;
  alignas(16) std::array<std::array<unsigned char, 16>, kWarp> values{};
};

struct Block {
  void* address = nullptr;
  size_t bytes = 0;
};

struct Thread : Self {
  State state = State::kReady;
  Place place = {nullptr, 0};
  WarpOperation* operation = nullptr;
  bool predicate = false;
  Fiber fiber{};
};

// One launch at a time: torch may call from several threads.
struct Machine {
  std::mutex mutex;
  std::vector<Thread> threads;
  std::vector<void*> stacks;
  std::array<unsigned, kMaxThreads> ready{};  // a ring: each thread stands in it at most once
  unsigned ready_count = 0;
  unsigned ready_head = 0;
  std::vector<WarpOperation> operations;  // kWarp per warp
  unsigned alive = 0;
  unsigned waiting = 0;
  std::array<unsigned, kMaxThreads / kWarp> gone{};  // lanes that returned or never were
  int vote_count = 0;
  bool vote_and = false;
  bool vote_or = false;
  std::string error;
  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  unsigned char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  Block fixed;  // __shared__ variables, and whatever else is thread-local here
  Fiber home{};
  uint64_t random = 1;
  uint64_t switches = 0;  // of this launch
};
extern Machine machine;

Thread& current();
uint32_t random_below(uint64_t n);
std::string where(const Thread& t);
void set_error(const std::string& what);  // the first one stays
void wake(Thread& t);
void wait_in(State state, Place place);

}  // namespace simt
