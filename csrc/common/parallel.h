// SPDX-License-Identifier: Apache-2.0
// How a kernel asks for threads. The doors inject their pool: torch's own behind the torch door,
// ThreadPool behind the NumPy door, a plain loop or std::thread in the C++ tests.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <thread>

#include "common/hd.h"

namespace pydense {

// A borrowed, allocation-free callable `void(int64_t begin, int64_t end)`.
class RangeFn {
 public:
  template <class Fn>
  RangeFn(const Fn& fn)  // NOLINT(google-explicit-constructor): lambdas convert at the call
      : context_(&fn), call_([](const void* context, int64_t begin, int64_t end) {
          (*static_cast<const Fn*>(context))(begin, end);
        }) {}
  void operator()(int64_t begin, int64_t end) const { call_(context_, begin, end); }

 private:
  const void* context_;
  void (*call_)(const void*, int64_t, int64_t);
};

// Runs fn over [begin, end) in pieces of at least `grain` indices, on any threads, and returns when
// all are done. fn must not throw.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFn fn);

inline void serial_for(int64_t begin, int64_t end, int64_t /*grain*/, RangeFn fn) {
  if (begin < end) {
    fn(begin, end);
  }
}

// The standard floating-point mode for a scope. Pool threads inherit the mode of the thread that
// started them: where one flushes denormals and another does not, results would depend on which
// thread ran a task.
class StandardFloatMode {
 public:
  PYDENSE_HD StandardFloatMode() : saved_(get()) { set(kStandard); }
  StandardFloatMode(const StandardFloatMode&) = delete;
  StandardFloatMode& operator=(const StandardFloatMode&) = delete;
  PYDENSE_HD ~StandardFloatMode() { set(saved_); }

 private:
#if defined(__x86_64__)
  using Mode = unsigned;
  static constexpr Mode kStandard = 0x1F80;  // round to nearest, all exceptions masked
  static PYDENSE_HD Mode get() { return __builtin_ia32_stmxcsr(); }
  static PYDENSE_HD void set(Mode mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kStandard = 0;
  static PYDENSE_HD Mode get() {
    Mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static PYDENSE_HD void set(Mode mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode)); }
#else
  using Mode = int;
  static constexpr Mode kStandard = 0;
  static PYDENSE_HD Mode get() { return 0; }
  static PYDENSE_HD void set(Mode /*mode*/) {}
#endif
  Mode saved_;
};

// Tells the CPU that this thread waits in a loop.
PYDENSE_HD void relax_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Calls task(i) for i in [0, tasks) in parallel. Tasks have a fixed size and write to places given
// by their index, so no result depends on the number of threads. An exception must not leave a
// parallel region (torch's pool would put build paths into its text): it becomes a status that is
// raised here, after the region.
template <class Task>
void parallel_tasks(ParallelFor parallel_for, int64_t tasks, const Task& task) {
  std::atomic<bool> out_of_memory{false};
  std::atomic<bool> failed{false};
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const StandardFloatMode mode;
    try {
      for (int64_t i = begin; i < end; ++i) {
        task(i);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    } catch (...) {
      failed = true;
    }
  });
  if (out_of_memory) {
    throw std::bad_alloc();
  }
  if (failed) {
    throw std::logic_error("pydense: a parallel task failed");
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMaxPhases = 40;

// Calls task(phase, i) for i in [0, count(phase)), phase by phase: a phase starts when the one
// before is through. One parallel region for all: threads that are awake wait for each other, which
// takes a fraction of what it takes to wake them again. task must not throw; up to kMaxPhases.
template <class Count, class Task>
void parallel_phases(ParallelFor parallel_for, int phases, const Count& count, const Task& task) {
  struct alignas(64) Progress {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  constexpr int64_t kMaxWorkers = 64;
  constexpr int kSpins = 1000;  // tens of microseconds; a thread that is not running takes longer
  Progress progress[kMaxPhases];
  int64_t most = 0;
  for (int p = 0; p < phases; ++p) {
    most = most < count(p) ? count(p) : most;
  }
  parallel_for(0, most < kMaxWorkers ? most : kMaxWorkers, 1, [&](int64_t, int64_t) {
    const StandardFloatMode mode;
    for (int p = 0; p < phases; ++p) {
      Progress& phase = progress[p];
      const int64_t tasks = count(p);
      if (phase.done.load(std::memory_order_acquire) == tasks) {
        continue;
      }
      for (int64_t i; (i = phase.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        task(p, i);
        phase.done.fetch_add(1, std::memory_order_acq_rel);
      }
      for (int spin = 0; phase.done.load(std::memory_order_acquire) < tasks; ++spin) {
        if (spin < kSpins) {
          relax_cpu();
        } else {
          std::this_thread::yield();
        }
      }
    }
  });
}

}  // namespace pydense
