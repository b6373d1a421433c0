// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests: a fiber per CUDA thread, one block at a time, threads
// and blocks in an order that a seed chooses. Needs the toolkit's headers (vector types, __half and
// __nv_bfloat16 are NVIDIA's own host versions) and links nothing of CUDA. Kernels include
// common/cuda.cuh, which gives them cuda_names.h; this file is what those names stand on.
#pragma once

#ifdef __CUDACC__
#error "simt.h takes nvcc's place"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#endif

namespace simt {

// What a kernel did wrong: a race, a deadlock, divergence, a bad address. The text names the
// kernel, the block, the thread and the line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kForward, kReverse, kRandom };

struct Config {
  uint64_t seed = 1;
  Order order = Order::kForward;  // of threads and of blocks
  bool preempt = true;            // let others run at atomics and, under trace, at one access in 16
  uint64_t max_switches = 2'000'000'000;  // then the kernel is taken to never end
  std::vector<uint64_t> only_blocks;      // unless empty: of which numbers to run, if in the grid
};
Config& config();

struct Stats {
  uint64_t launches, blocks_begun, threads, switches, barriers, warp_operations;
};
Stats& stats();

// The CUDA thread that is running.
struct Self {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned linear, lane, warp;
  void* stack;
};
extern Self* self;
constexpr size_t kStackBytes = size_t{64} << 10;

// Who watches a launch: the trace build (trace.cpp). Null in the others.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void launch_begins(const char* kernel) = 0;
  virtual void block_begins(void* fixed_shared, size_t fixed_bytes, void* dynamic_shared,
                            size_t dynamic_bytes) = 0;
  virtual void barrier() = 0;
  virtual void warp_sync(unsigned warp, unsigned lanes) = 0;
  virtual void matrix_product() = 0;  // of a warp, mma.sync m16n8k16
  virtual void shown() = 0;           // what the thread wrote, to products of four warps
  virtual void product_read(const void* address, size_t bytes, const void* from) = 0;  // by those
  virtual void launch_ends() = 0;
  virtual void access(const void* address, size_t bytes, bool write, bool atomic,
                      const void* from) = 0;
  virtual void add_buffer(const void* address, size_t bytes, size_t element, const char* name) = 0;
  virtual void drop_buffer(const void* address) = 0;
};
extern Observer* observer;

void launch_erased(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   void (*body)(void*), void* context);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments&&... arguments) {
  std::tuple<std::decay_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
  auto body = [&] { std::apply(kernel, values); };
  launch_erased(
      name, grid, block, shared_bytes,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

// ---- what kernels call, through cuda_names.h -------------------------------------------------

// Where in the source an operation stands, as a default argument.
struct Place {
  const char* file;
  int line;
};
#define SIMT_HERE ::simt::Place place = {__builtin_FILE(), __builtin_LINE()}

enum class Vote { kCount, kAnd, kOr };
enum class Shuffle { kIndex, kUp, kDown, kXor };
// Operations of a warp: lanes that meet must meet in the same one.
enum class WarpKind { kSync, kShuffle, kBallot, kMatch, kMmaA, kMmaB, kLoadMatrix, kWgmma };

[[noreturn]] void fail(const std::string& what);
void* dynamic_shared();
int block_barrier(Vote vote, bool predicate, Place place);
void maybe_preempt();
void yield_now();

// Every lane of the mask brings `bytes` (at most 16). Returns, when all have come, the lanes that
// took part; `all` then holds 32 slots of `bytes`.
unsigned warp_gather(WarpKind kind, unsigned detail, unsigned mask, const void* mine, void* all,
                     size_t bytes, Place place);

// One access of up to 16 bytes, counted and checked as one.
void load(void* to, const void* from, size_t bytes);
void store(void* to, const void* from, size_t bytes);

template <class T>
T shuffle(Shuffle kind, unsigned mask, T value, int by, int width, Place place) {
  static_assert(sizeof(T) <= 16);
  T all[32];
  const unsigned present = warp_gather(WarpKind::kShuffle, static_cast<unsigned>(kind), mask,
                                       &value, all, sizeof(T), place);
  const int lane = static_cast<int>(self->lane);
  const int segment = lane & ~(width - 1);
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = segment + (by & (width - 1));
      break;
    case Shuffle::kUp:
      source = lane - by < segment ? lane : lane - by;
      break;
    case Shuffle::kDown:
      source = lane + by >= segment + width ? lane : lane + by;
      break;
    case Shuffle::kXor:
      source = (lane ^ by) >= segment + width ? lane : lane ^ by;
      break;
  }
  if ((present >> source & 1) == 0) {
    fail("a shuffle reads lane " + std::to_string(source) + ", which does not take part, at " +
         place.file + ":" + std::to_string(place.line));
  }
  return all[source];
}

template <size_t Bytes>
using Bits = std::conditional_t<
    Bytes == 1, uint8_t,
    std::conditional_t<Bytes == 2, uint16_t, std::conditional_t<Bytes == 4, uint32_t, uint64_t>>>;

// Relaxed, as CUDA's atomics are. Returns the old value.
template <class T, class Update>
T read_modify_write(T* address, Update update) {
  maybe_preempt();
  auto* const bits = reinterpret_cast<Bits<sizeof(T)>*>(address);
  auto old_bits = __atomic_load_n(bits, __ATOMIC_RELAXED);
  auto new_bits = old_bits;
  T old_value;
  do {
    __builtin_memcpy(&old_value, &old_bits, sizeof(T));
    const T new_value = update(old_value);
    __builtin_memcpy(&new_bits, &new_value, sizeof(T));
  } while (!__atomic_compare_exchange_n(bits, &old_bits, new_bits, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  return old_value;
}

// What an atomic operation becomes when mutate.py plants that fault.
template <class T>
T plain_add(T* address, std::common_type_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T load_relaxed(const T* address) {
  maybe_preempt();
  const auto bits =
      __atomic_load_n(reinterpret_cast<const Bits<sizeof(T)>*>(address), __ATOMIC_RELAXED);
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T load_value(const T* from) {
  if constexpr (sizeof(T) <= 8 && alignof(T) == sizeof(T) && std::is_scalar_v<T>) {
    return *from;
  } else {
    T value;
    load(&value, from, sizeof(T));
    return value;
  }
}

}  // namespace simt
