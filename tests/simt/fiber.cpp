// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

extern "C" {  // weak: there when the program is linked with AddressSanitizer
void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));
void __sanitizer_start_switch_fiber(void**, const void*, size_t) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) __attribute__((weak));
}

namespace simt {

#if defined(__x86_64__)
extern "C" void simt_switch_stack(void** save, void* to);
// A jump and not a return: the processor's stack of return addresses would guess wrong each time.
asm(R"(
  .text
  .hidden simt_switch_stack
  .globl simt_switch_stack
  .type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size simt_switch_stack, .-simt_switch_stack
)");
#endif

void prepare_fiber(Fiber& fiber, void* stack, size_t bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.bytes = bytes;
  fiber.fake_stack = nullptr;
  if (__asan_unpoison_memory_region != nullptr) {
    __asan_unpoison_memory_region(stack, bytes);
  }
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes - 64);
  *--top = nullptr;  // where a return address would be: keeps the ABI's alignment
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;  // six registers are popped before the jump
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void fiber_entered(Fiber& owner) {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    const void* stack = nullptr;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &owner.bytes);
    owner.stack = const_cast<void*>(stack);
  }
}

void switch_fiber(Fiber& from, Fiber& to, bool dying) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(dying ? nullptr : &from.fake_stack, to.stack, to.bytes);
  }
#if defined(__x86_64__)
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
  }
}

}  // namespace simt
