// SPDX-License-Identifier: Apache-2.0
// Stacks to switch between: a few instructions on x86-64, ucontext (a system call each) elsewhere.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  void* stack;  // nullptr: the thread's own, which is learned at the first switch away from it
  size_t bytes;
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void* fake_stack;  // AddressSanitizer's
};

// Makes the next switch to `fiber` call entry(), which must not return.
void prepare_fiber(Fiber& fiber, void* stack, size_t bytes, void (*entry)());
// entry() calls this first.
void fiber_entered(Fiber& owner);
// Leaves `from`, which is `dying` when nobody will switch back to it.
void switch_fiber(Fiber& from, Fiber& to, bool dying = false);

}  // namespace simt
