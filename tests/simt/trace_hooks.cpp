// SPDX-License-Identifier: Apache-2.0
// The functions that -fsanitize=thread puts at loads and stores, and -fsanitize-coverage=trace-pc
// at basic blocks.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace simt {
void trace_access(const void* address, size_t bytes, bool write, bool atomic, const void* from);
void trace_basic_block(const void* from);
}  // namespace simt

#define SIMT_FROM __builtin_return_address(0)
#define SIMT_TOUCH(address, bytes, write, atomic)                                                  \
  ::simt::trace_access(const_cast<const void*>(static_cast<const volatile void*>(address)), bytes, \
                       write, atomic, SIMT_FROM)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void* /*from*/) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void** /*pointer*/, void* /*value*/) {}
void __tsan_vptr_read(void** /*pointer*/) {}
void __tsan_atomic_thread_fence(int /*order*/) {}
void __tsan_atomic_signal_fence(int /*order*/) {}
void __sanitizer_cov_trace_pc() { ::simt::trace_basic_block(SIMT_FROM); }

// Volatile accesses of 4 or 8 bytes count as atomic.
#define SIMT_SIZE(n)                                                           \
  void __tsan_read##n(void* p) { SIMT_TOUCH(p, n, false, false); }             \
  void __tsan_write##n(void* p) { SIMT_TOUCH(p, n, true, false); }             \
  void __tsan_unaligned_read##n(void* p) { SIMT_TOUCH(p, n, false, false); }   \
  void __tsan_unaligned_write##n(void* p) { SIMT_TOUCH(p, n, true, false); }   \
  void __tsan_volatile_read##n(void* p) { SIMT_TOUCH(p, n, false, (n) >= 4); } \
  void __tsan_volatile_write##n(void* p) { SIMT_TOUCH(p, n, true, (n) >= 4); } \
  void __tsan_read_write##n(void* p) {                                         \
    SIMT_TOUCH(p, n, false, false);                                            \
    SIMT_TOUCH(p, n, true, false);                                             \
  }
SIMT_SIZE(1)
SIMT_SIZE(2)
SIMT_SIZE(4)
SIMT_SIZE(8)
SIMT_SIZE(16)

void __tsan_read_range(void* p, size_t bytes) { SIMT_TOUCH(p, bytes, false, false); }
void __tsan_write_range(void* p, size_t bytes) { SIMT_TOUCH(p, bytes, true, false); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  SIMT_TOUCH(from, bytes, false, false);
  SIMT_TOUCH(to, bytes, true, false);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  SIMT_TOUCH(from, bytes, false, false);
  SIMT_TOUCH(to, bytes, true, false);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  SIMT_TOUCH(to, bytes, true, false);
  return std::memset(to, value, bytes);
}

// Fibers switch only inside of SIMT_TOUCH, so what follows it is atomic. In the shim, compare and
// exchange makes every other atomic operation.
#define SIMT_EXCHANGE(strength, bits, T)                                                          \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile T* p, T* expected, T value, int, \
                                                        int) {                                    \
    SIMT_TOUCH(p, sizeof(T), true, true);                                                         \
    const T old = *p;                                                                             \
    const bool same = old == *expected;                                                           \
    *p = same ? value : old;                                                                      \
    *expected = old;                                                                              \
    return same ? 1 : 0;                                                                          \
  }
#define SIMT_ATOMIC(bits, T)                                                                   \
  SIMT_EXCHANGE(weak, bits, T)                                                                 \
  SIMT_EXCHANGE(strong, bits, T)                                                               \
  T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T expected, T value, int, int) { \
    SIMT_TOUCH(p, sizeof(T), true, true);                                                      \
    const T old = *p;                                                                          \
    *p = old == expected ? value : old;                                                        \
    return old;                                                                                \
  }                                                                                            \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {                                     \
    SIMT_TOUCH(p, sizeof(T), false, true);                                                     \
    return *p;                                                                                 \
  }
SIMT_ATOMIC(8, uint8_t)
SIMT_ATOMIC(16, uint16_t)
SIMT_ATOMIC(32, uint32_t)
SIMT_ATOMIC(64, uint64_t)
}
