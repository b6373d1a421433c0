// SPDX-License-Identifier: Apache-2.0
// How a kernel asks for threads. The doors inject their pool: torch's own behind the torch door,
// ThreadPool behind the NumPy door, a plain loop or std::thread in the C++ tests.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <stdexcept>

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

// Calls task(i) for i in [0, tasks) in parallel. Tasks have a fixed size and write to places given
// by their index, so no result depends on the number of threads. An exception must not leave a
// parallel region (torch's pool would put build paths into its text): it becomes a status that is
// raised here, after the region.
template <class Task>
void parallel_tasks(ParallelFor parallel_for, int64_t tasks, const Task& task) {
  std::atomic<bool> out_of_memory{false};
  std::atomic<bool> failed{false};
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
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

}  // namespace pydense
