// SPDX-License-Identifier: Apache-2.0
// The shim's machine: which fiber runs next, what waits for what, and what a kernel may not do.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "machine.h"

namespace simt {

Self* self = nullptr;
Observer* observer = nullptr;

Config& config() {
  static Config instance;
  return instance;
}
Stats& stats() {
  static Stats instance;
  return instance;
}

Machine machine;

Thread& current() { return *static_cast<Thread*>(self); }

uint32_t random_below(uint64_t n) {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return static_cast<uint32_t>((machine.random >> 11) % n);
}

std::string where(const Thread& t) {
  const auto triple = [](uint3 v) {
    return std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z);
  };
  std::string text = "block " + triple(t.block) + " thread " + triple(t.thread);
  if (t.place.file != nullptr) {
    text += std::string(" at ") + t.place.file + ":" + std::to_string(t.place.line);
  }
  return text;
}

void set_error(const std::string& what) {
  if (machine.error.empty()) {
    machine.error = std::string(machine.kernel) + ": " + what;
  }
}

void wake(Thread& t) {
  t.state = State::kReady;
  machine.ready[(machine.ready_head + machine.ready_count++) % kMaxThreads] = t.linear;
}

void wait_in(State state, Place place) {
  Thread& t = current();
  t.state = state;
  t.place = place;
  switch_fiber(t.fiber, machine.home);
}

namespace {

// Nobody can run: if everybody who lives waits at one barrier, it opens.
void open_barrier() {
  if (machine.waiting == 0 || machine.waiting < machine.alive) {
    return;
  }
  const Thread* first = nullptr;
  for (const Thread& t : machine.threads) {
    if (t.state != State::kAtBarrier) {
      continue;
    }
    if (first == nullptr) {
      first = &t;
    } else if (first->place.line != t.place.line ||
               std::strcmp(first->place.file, t.place.file) != 0) {
      set_error("divergent __syncthreads: " + where(*first) + ", but " + where(t));
      return;
    }
  }
  machine.vote_count = 0;
  machine.vote_and = true;
  machine.vote_or = false;
  for (Thread& t : machine.threads) {
    if (t.state == State::kAtBarrier) {
      machine.vote_count += t.predicate ? 1 : 0;
      machine.vote_and = machine.vote_and && t.predicate;
      machine.vote_or = machine.vote_or || t.predicate;
      wake(t);
    }
  }
  machine.waiting = 0;
  ++stats().barriers;
  if (observer != nullptr) {
    observer->barrier();
  }
}

void close_if_complete(WarpOperation& operation, unsigned warp) {
  if (!operation.open || (operation.mask & ~machine.gone[warp] & ~operation.present) != 0) {
    return;
  }
  operation.open = false;
  operation.to_leave = operation.present;
  ++stats().warp_operations;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((operation.present >> lane & 1) != 0) {
      wake(machine.threads[warp * kWarp + lane]);
    }
  }
  // Of the warp operations only __syncwarp orders memory accesses.
  if (observer != nullptr && operation.kind == WarpKind::kSync) {
    observer->warp_sync(warp, operation.present);
  }
}

void run_thread() {
  fiber_entered(machine.home);
  machine.body(machine.context);
  Thread& t = current();
  t.state = State::kDone;
  --machine.alive;
  machine.gone[t.warp] |= 1U << t.lane;
  switch_fiber(t.fiber, machine.home, true);
  std::abort();
}

// __shared__ variables are thread-local (cuda_names.h): the block of thread-local storage of the
// program or library that this function is in, for the calling thread.
#ifdef SIMT_ASAN
Block fixed_shared() { return {}; }
#else
thread_local volatile char touch_to_allocate;
Block fixed_shared() {
  touch_to_allocate = 1;
  Block found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t /*size*/, void* result) {
        const uintptr_t offset = reinterpret_cast<uintptr_t>(&machine) - info->dlpi_addr;
        bool here = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          here = here || (header.p_type == PT_LOAD && offset - header.p_vaddr < header.p_memsz);
        }
        for (int i = 0; here && i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type == PT_TLS) {
            *static_cast<Block*>(result) = {info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz};
          }
        }
        return here ? 1 : 0;
      },
      &found);
  return found;
}
#endif

void start_block(uint3 block, dim3 block_size, dim3 grid_size) {
  ++stats().blocks_begun;
  const auto count = static_cast<unsigned>(machine.threads.size());
  machine.alive = count;
  machine.waiting = machine.ready_count = machine.ready_head = 0;
  for (WarpOperation& operation : machine.operations) {
    operation.open = false;
    operation.to_leave = 0;
  }
  for (unsigned w = 0; w < machine.gone.size(); ++w) {
    const unsigned first = w * kWarp;
    machine.gone[w] = count >= first + kWarp ? 0 : count <= first ? ~0U : ~0U << (count - first);
  }
  // NaN as floating point, -1 as a number: a read of what nobody wrote is seen in the result.
  const Block fixed = machine.fixed;
  if (fixed.bytes > 0) {
    std::memset(fixed.address, 0xFF, fixed.bytes);
  }
  std::memset(machine.dynamic_shared, 0xFF, machine.dynamic_bytes);
  if (observer != nullptr) {
    observer->block_begins(fixed.address, fixed.bytes, machine.dynamic_shared,
                           machine.dynamic_bytes);
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = machine.threads[i];
    t.thread = {i % block_size.x, i / block_size.x % block_size.y,
                i / (block_size.x * block_size.y)};
    t.block = block;
    t.block_size = block_size;
    t.grid_size = grid_size;
    t.linear = i;
    t.lane = i % kWarp;
    t.warp = i / kWarp;
    t.stack = machine.stacks[i];
    t.place = {nullptr, 0};
    t.operation = nullptr;
    prepare_fiber(t.fiber, t.stack, kStackBytes, run_thread);
    wake(t);
  }
  if (config().order == Order::kReverse) {
    std::reverse(machine.ready.begin(), machine.ready.begin() + count);
  }
}

void report_deadlock() {
  std::string text = "deadlock:";
  int shown = 0;
  for (const Thread& t : machine.threads) {
    if (shown < 4 && (t.state == State::kAtBarrier || t.state == State::kInWarpOperation)) {
      text += (shown++ != 0 ? "; " : " ") + where(t);
      text += t.state == State::kAtBarrier ? " waits in __syncthreads" : " waits for its warp";
    }
  }
  set_error(text);
}

void run_block() {
  const auto warps = static_cast<unsigned>(machine.operations.size()) / kWarp;
  while (machine.alive > 0 && machine.error.empty()) {
    if (machine.ready_count == 0) {
      open_barrier();
      for (unsigned i = 0; i < warps * kWarp; ++i) {
        close_if_complete(machine.operations[i], i / kWarp);  // lanes it waited for have returned
      }
      if (machine.ready_count == 0) {
        report_deadlock();
        return;
      }
    }
    if (config().order == Order::kRandom) {  // else: first come, first run
      std::swap(
          machine.ready[machine.ready_head],
          machine.ready[(machine.ready_head + random_below(machine.ready_count)) % kMaxThreads]);
    }
    Thread& t = machine.threads[machine.ready[machine.ready_head]];
    machine.ready_head = (machine.ready_head + 1) % kMaxThreads;
    --machine.ready_count;
    self = &t;
    switch_fiber(machine.home, t.fiber);
    if (t.state == State::kInWarpOperation && t.operation->open) {
      close_if_complete(*t.operation, t.warp);
    }
    ++stats().switches;
    if (++machine.switches > config().max_switches) {
      set_error("live-lock: more than max_switches switches");
    }
  }
}

void make_stacks(size_t count) {
  while (machine.stacks.size() < count) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    machine.stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
  }
}

std::vector<uint64_t> block_order(uint64_t blocks) {
  std::vector<uint64_t> order = config().only_blocks;
  if (!order.empty()) {
    std::erase_if(order, [&](uint64_t i) { return i >= blocks; });
  } else {
    order.resize(blocks);
    for (uint64_t i = 0; i < blocks; ++i) {
      order[i] = i;
    }
  }
  if (config().order == Order::kReverse) {
    std::reverse(order.begin(), order.end());
  } else if (config().order == Order::kRandom) {
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[random_below(i)]);
    }
  }
  return order;
}

}  // namespace

void launch_erased(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   void (*body)(void*), void* context) {
  const std::scoped_lock lock(machine.mutex);
  const size_t count = size_t{block.x} * block.y * block.z;
  make_stacks(count);
  machine.threads.assign(count, Thread{});
  machine.operations.assign((count + kWarp - 1) / kWarp * kWarp, WarpOperation{});
  machine.random = config().seed * 0x9E3779B97F4A7C15U + 1;
  machine.switches = 0;
  machine.error.clear();
  machine.kernel = kernel;
  machine.body = body;
  machine.context = context;
  void* shared = nullptr;
  // Exact, so that AddressSanitizer sees one byte too many.
  if (posix_memalign(&shared, 128, std::max<size_t>(shared_bytes, 1)) != 0) {
    throw std::bad_alloc();
  }
  const std::unique_ptr<void, decltype(&std::free)> owner(shared, std::free);
  machine.dynamic_shared = static_cast<unsigned char*>(shared);
  machine.dynamic_bytes = shared_bytes;
  machine.fixed = fixed_shared();
  const auto* const fixed_begin = static_cast<const unsigned char*>(machine.fixed.address);
  const std::vector<unsigned char> thread_locals(fixed_begin, fixed_begin + machine.fixed.bytes);
  if (observer != nullptr) {
    observer->launch_begins(kernel);
  }
  const std::vector<uint64_t> order = block_order(uint64_t{grid.x} * grid.y * grid.z);
  for (const uint64_t number : order) {
    const uint3 index = {static_cast<unsigned>(number % grid.x),
                         static_cast<unsigned>(number / grid.x % grid.y),
                         static_cast<unsigned>(number / grid.x / grid.y)};
    start_block(index, block, grid);
    run_block();
    if (!machine.error.empty()) {
      break;
    }
  }
  self = nullptr;
  if (!thread_locals.empty()) {
    std::memcpy(machine.fixed.address, thread_locals.data(), thread_locals.size());
  }
  if (observer != nullptr) {
    observer->launch_ends();
  }
  ++stats().launches;
  stats().threads += order.size() * count;
  if (!machine.error.empty()) {
    throw Error(machine.error);
  }
}

}  // namespace simt
