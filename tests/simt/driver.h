// SPDX-License-Identifier: Apache-2.0
// What the tests of kernels under the shim share: buffers that notice a wrong index, cases that run
// under several schedules, limits on what a launch asks of memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "common/launch.cuh"
#include "counters.h"
#include "simt.h"

namespace simt {

// Memory of exactly n elements, filled with 0xFF bytes (NaN): one element too many is a report of
// AddressSanitizer or of the trace.
template <class T>
class Buffer {
 public:
  Buffer(size_t n, const char* name) : n_(n) {
    const size_t zone = observer != nullptr ? kZone : 0;
    if (posix_memalign(&memory_, kZone, std::max<size_t>(n * sizeof(T), 1) + 2 * zone) != 0) {
      throw std::bad_alloc();
    }
    data_ = reinterpret_cast<T*>(static_cast<char*>(memory_) + zone);
    __builtin_memset(static_cast<void*>(data_), 0xFF, n * sizeof(T));
    if (observer != nullptr) {
      observer->add_buffer(data_, n * sizeof(T), std::min<size_t>(sizeof(T), 8), name);
    }
  }
  template <class U>
  Buffer(const std::vector<U>& values, const char* name) : Buffer(values.size(), name) {
    for (size_t i = 0; i < n_; ++i) {
      data_[i] = static_cast<T>(values[i]);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (observer != nullptr) {
      observer->drop_buffer(data_);
    }
    std::free(memory_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return n_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + n_; }

 private:
  static constexpr size_t kZone = 256;
  size_t n_;
  void* memory_ = nullptr;
  T* data_ = nullptr;
};

// Addresses for n elements, memory for those that are touched alone: for tensors past 2^31
// elements, together with config().only_blocks. Zeros; not watched by the trace.
class SparseMemory {
 public:
  explicit SparseMemory(size_t bytes);
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;
  ~SparseMemory();
  template <class T>
  T* as() {
    return static_cast<T*>(memory_);
  }

 private:
  size_t bytes_;
  void* memory_;
};

// Uniform numbers in [-scale, scale], the same in every run; those of 16-bit types are rounded.
std::vector<double> random_values(size_t n, uint64_t seed, double scale = 1);
template <class T>
void fill(Buffer<T>& buffer, uint64_t seed, double scale = 1) {
  const std::vector<double> values = random_values(buffer.size(), seed, scale);
  for (size_t i = 0; i < buffer.size(); ++i) {
    buffer[i] = pydense::from_accumulate<T>(static_cast<pydense::Accumulate<T>>(values[i]));
  }
}

// A failure is printed and counted; the case goes on.
void report_failure(const char* file, int line, const std::string& what);
int failure_count();  // of the case that runs, or ran last
#define SIMT_EXPECT(condition)                                \
  do {                                                        \
    if (!(condition)) {                                       \
      ::simt::report_failure(__FILE__, __LINE__, #condition); \
    }                                                         \
  } while (false)

// |got - expected| <= absolute + relative |expected| for every element; NaN equals NaN.
void expect_close_at(const char* file, int line, double got, double expected, double relative,
                     double absolute, size_t index);
template <class T>
void expect_close(const Buffer<T>& got, const std::vector<double>& expected, double relative,
                  double absolute, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (got.size() != expected.size()) {
    report_failure(file, line, "sizes differ");
    return;
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    expect_close_at(file, line, static_cast<double>(pydense::to_accumulate(got[i])), expected[i],
                    relative, absolute, i);
  }
}

// Limits on one launch, and what its time on a GPU is predicted from. A limit above its default
// needs a reason.
struct Limits {
  const char* kernel;        // as in `__global__ void kernel`
  double minimum_bytes;      // inputs read once and outputs written once, at the counted shape
  double moved = 1.2;        // bytes in distinct sectors / minimum_bytes
  double sectors = 1.3;      // sectors / sectors of lanes that lie side by side, over requests
  double wavefronts = 1.05;  // passes over shared memory / passes without bank conflicts
  const char* reason = "";
  const char* shape = "";  // the shape the prediction is for
  double scale = 1;        // its work / the work of the counted launch
};
// Calls launch() once. In the trace build the counts of every kernel that it launches are held to
// the kernel's limits; a kernel without limits is a failure.
void counted(const std::vector<Limits>& limits, const std::function<void()>& launch);
inline void counted(const Limits& limits, const std::function<void()>& launch) {
  counted(std::vector<Limits>{limits}, launch);
}

enum Builds : unsigned { kRelease = 1, kAsan = 2, kTrace = 4, kEverywhere = 7 };
Builds this_build();

struct Case {
  const char* name;
  std::function<void()> run;  // once per schedule
  unsigned builds = kEverywhere;
};
// main() of a driver: [--schedules N] [--only TEXT] [--counters FILE] [--lines] [--first-failure].
int run_cases(int argc, char** argv, const std::vector<Case>& cases);

// Whether some schedule of this build finds fault with run(), which runs in processes of its own.
bool is_caught(const std::function<void()>& run);

}  // namespace simt
