// SPDX-License-Identifier: Apache-2.0
// What kernels call. Fibers run this: nothing may own memory when it switches, because a fiber of
// a failed launch never comes back.
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace simt {

void fail(const std::string& what) {  // the fiber is abandoned: kernels hold no resources
  set_error(what + " [" + where(current()) + "]");
  switch_fiber(current().fiber, machine.home);
  std::abort();
}

void* dynamic_shared() { return machine.dynamic_shared; }

void yield_now() {
  wake(current());
  switch_fiber(current().fiber, machine.home);
}

void maybe_preempt() {
  if (config().preempt && random_below(2) != 0) {
    yield_now();
  }
}

int block_barrier(Vote vote, bool predicate, Place place) {
  current().predicate = predicate;
  ++machine.waiting;
  wait_in(State::kAtBarrier, place);
  switch (vote) {
    case Vote::kAnd:
      return machine.vote_and ? 1 : 0;
    case Vote::kOr:
      return machine.vote_or ? 1 : 0;
    default:
      return machine.vote_count;
  }
}

unsigned warp_gather(WarpKind kind, unsigned detail, unsigned mask, const void* mine, void* all,
                     size_t bytes, Place place) {
  Thread& t = current();
  t.place = place;
  if ((mask >> t.lane & 1) == 0) {
    fail("a lane calls a warp operation whose mask leaves it out");
  }
  WarpOperation* const operations = &machine.operations[size_t{t.warp} * kWarp];
  WarpOperation* operation = nullptr;
  for (unsigned i = 0; i < kWarp && operation == nullptr; ++i) {
    WarpOperation& other = operations[i];
    if (other.open && (other.mask & mask) != 0) {
      if (other.mask != mask || other.kind != kind || other.detail != detail ||
          other.bytes != bytes) {
        fail("lanes of one warp meet in different warp operations (mask, kind or type)");
      }
      operation = &other;
    }
  }
  for (unsigned i = 0; i < kWarp && operation == nullptr; ++i) {
    if (!operations[i].open && operations[i].to_leave == 0) {
      operation = &operations[i];
      operation->mask = mask;
      operation->kind = kind;
      operation->detail = detail;
      operation->bytes = bytes;
      operation->present = 0;
      operation->open = true;
    }
  }
  if (bytes > 0) {
    std::memcpy(operation->values[t.lane].data(), mine, bytes);
  }
  operation->present |= 1U << t.lane;
  t.operation = operation;
  wait_in(State::kInWarpOperation, place);
  for (unsigned lane = 0; bytes > 0 && lane < kWarp; ++lane) {
    std::memcpy(static_cast<char*>(all) + lane * bytes, operation->values[lane].data(), bytes);
  }
  const unsigned present = operation->present;
  operation->to_leave &= ~(1U << t.lane);
  return present;
}

void load(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("misaligned load of " + std::to_string(bytes) + " bytes");
  }
  if (observer != nullptr) {
    observer->access(from, bytes, false, false, __builtin_return_address(0));
  }
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) {
    fail("misaligned store of " + std::to_string(bytes) + " bytes");
  }
  if (observer != nullptr) {
    observer->access(to, bytes, true, false, __builtin_return_address(0));
  }
  std::memcpy(to, from, bytes);
}

}  // namespace simt
