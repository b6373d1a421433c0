// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "common/buffer.h"
#include "common/check.h"
#include "common/cpu_isa.h"
#include "common/mapping.h"
#include "common/simd.h"
#include "common/thread_pool.h"
#include "selftest/selftest.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::thread_for;

namespace {

void test_check() {
  EXPECT_THROWS(throw_invalid_argument("op: n must be 1, got ", 2), "op: n must be 1, got 2");
  const auto checked = [](int n) { PYDENSE_CHECK(n == 1, "op: n must be 1, got ", n); };
  EXPECT(testing::message_of([&] { checked(1); }).empty());
  EXPECT_THROWS(checked(3), "got 3");
}

void test_buffer() {
  Buffer buffer(100);
  EXPECT(reinterpret_cast<uintptr_t>(buffer.data()) % 64 == 0);
  buffer.as<char>()[99] = 7;
  buffer.grow(1000, 100);
  EXPECT(buffer.bytes() == 1000 && buffer.as<char>()[99] == 7);
  buffer.grow(10, 0);
  EXPECT(buffer.bytes() == 1000);
  const Buffer moved = std::move(buffer);
  EXPECT(moved.bytes() == 1000);
  EXPECT(Buffer(0).data() == nullptr);
  EXPECT_THROWS(checked_bytes(SIZE_MAX / 2, 4), "bad_alloc");
}

void test_mappings(ParallelFor parallel_for) {
  constexpr size_t kMiB = size_t{1} << 20;
  if (kMinMappedBytes > kMiB) {
    return;  // no mappings on this system, or in this build
  }
  drop_kept_mappings();
  const size_t before = mapped_bytes().in_use;
  EXPECT(mapped_bytes().kept == 0);
  void* first = nullptr;
  {
    const Buffer large(8 * kMiB);
    first = large.data();
    EXPECT(reinterpret_cast<uintptr_t>(first) % (2 * kMiB) == 0);
    std::memset(first, 1, large.bytes());
    EXPECT(mapped_bytes().in_use - before == 8 * kMiB);
  }
  EXPECT(mapped_bytes().in_use == before && mapped_bytes().kept == 8 * kMiB);
  {
    Buffer again(8 * kMiB - 100);  // the same pages
    EXPECT(again.data() == first && mapped_bytes().kept == 0);
    const Buffer moved(std::move(again));
    EXPECT(moved.data() == first && mapped_bytes().in_use - before == 8 * kMiB);
  }
  {
    // Parts of the same pages, and the rest of them.
    const Buffer half(4 * kMiB);
    EXPECT(half.data() == first && mapped_bytes().in_use - before == 4 * kMiB);
    const Buffer tensor(2 * kMiB, Lifetime::kTensor);  // from the other end
    EXPECT(tensor.data() == half.as<char>() + 6 * kMiB && mapped_bytes().kept == 2 * kMiB);
    const Buffer other(2 * kMiB);
    EXPECT(other.data() == half.as<char>() + 4 * kMiB && mapped_bytes().kept == 0);
    std::memset(first, 7, 8 * kMiB);
  }
  {
    // What came back in parts is one piece again, not a fresh one at the same place.
    const Buffer whole(8 * kMiB);
    const auto* const bytes = whole.as<unsigned char>();
    EXPECT(whole.data() == first && mapped_bytes().kept == 0);
    EXPECT(bytes[0] == 7 && bytes[5 * kMiB] == 7 && bytes[7 * kMiB] == 7);
  }
  {
    const Buffer larger(8 * kMiB + kMiB / 2);  // what is kept is too small, and goes
    first = larger.data();
    EXPECT(mapped_bytes().in_use - before == 8 * kMiB + kMiB / 2 && mapped_bytes().kept == 0);
  }
  {
    const Buffer most(8 * kMiB + kMiB / 2 - 3 * kMinMappedBytes / 4);  // the rest is of no use
    EXPECT(most.data() == first && mapped_bytes().kept == 0);
    EXPECT(mapped_bytes().in_use - before == 8 * kMiB + kMiB / 2);
  }
  {
    const Buffer all(20 * kMiB);
  }
  {
    Buffer one(6 * kMiB);
    const Buffer between(2 * kMiB);
    Buffer other(6 * kMiB);
    const Buffer last(6 * kMiB);
    one = Buffer();
    other = Buffer();
    EXPECT(mapped_bytes().kept == 12 * kMiB);
    const Buffer larger(8 * kMiB);  // than both: 8 of their 12 MiB have to go
    EXPECT(mapped_bytes().in_use - before == 16 * kMiB && mapped_bytes().kept == 4 * kMiB);
  }
  drop_kept_mappings();
  {
    const Buffer all(20 * kMiB);
  }
  {
    Buffer large(6 * kMiB);
    const Buffer between(2 * kMiB);
    Buffer small(2 * kMiB);
    const Buffer last(10 * kMiB);
    const void* const place = small.data();
    large = Buffer();
    small = Buffer();
    const Buffer again(2 * kMiB);  // the smallest that is large enough, though the other is older
    EXPECT(again.data() == place);
  }
  EXPECT(mapped_bytes().in_use == before && mapped_bytes().kept <= 20 * kMiB);
  parallel_tasks(parallel_for, 200, [&](int64_t i) {
    const Buffer mine(kMiB + static_cast<size_t>(i % 7) * 100000);
    const Buffer more(kMiB / 2 + static_cast<size_t>(i % 11) * 300000, Lifetime::kTensor);
    const auto value = static_cast<unsigned char>(i);
    std::memset(mine.data(), value, mine.bytes());
    std::memset(more.data(), value + 1, more.bytes());
    const auto all = [](const Buffer& buffer, unsigned char expected) {
      const auto* const bytes = buffer.as<unsigned char>();
      return std::all_of(bytes, bytes + buffer.bytes(),
                         [=](unsigned char byte) { return byte == expected; });
    };
    EXPECT(all(mine, value) && all(more, static_cast<unsigned char>(value + 1)));
  });
  EXPECT(mapped_bytes().in_use == before);
  drop_kept_mappings();
  EXPECT(mapped_bytes().kept == 0);
  EXPECT_THROWS(Buffer(SIZE_MAX / 4), "bad_alloc");
  EXPECT(mapped_bytes().in_use == before);
}

void test_parallel_tasks(ParallelFor parallel_for) {
  std::vector<int> seen(1000, 0);
  parallel_tasks(parallel_for, 1000, [&](int64_t i) { ++seen[static_cast<size_t>(i)]; });
  for (const int count : seen) {
    EXPECT(count == 1);
  }
  parallel_tasks(parallel_for, 0, [&](int64_t) { EXPECT(false); });
  EXPECT_THROWS(parallel_tasks(parallel_for, 50,
                               [](int64_t i) {
                                 if (i == 33) {
                                   throw std::bad_alloc();
                                 }
                               }),
                "bad_alloc");
  EXPECT_THROWS(parallel_tasks(parallel_for, 50,
                               [](int64_t i) {
                                 if (i == 49) {
                                   throw std::runtime_error("some path");
                                 }
                               }),
                "a parallel task failed");
}

// Every task of a phase sees all of the phase before; empty phases and none at all.
void test_parallel_phases(ParallelFor parallel_for) {
  constexpr int kPhases = 6;
  constexpr int64_t kSizes[kPhases] = {300, 1, 0, 77, 100, 3};
  std::vector<int> seen[kPhases];
  for (int p = 0; p < kPhases; ++p) {
    seen[p].assign(static_cast<size_t>(kSizes[p]), 0);
  }
  std::atomic<int> early{0};
  parallel_phases(
      parallel_for, kPhases, [&](int phase) { return kSizes[phase]; },
      [&](int phase, int64_t i) {
        for (int before = 0; before < phase; ++before) {
          for (const int count : seen[before]) {
            early += count == 1 ? 0 : 1;
          }
        }
        ++seen[phase][static_cast<size_t>(i)];
      });
  EXPECT(early == 0);
  for (const std::vector<int>& phase : seen) {
    for (const int count : phase) {
      EXPECT(count == 1);
    }
  }
  parallel_phases(parallel_for, 0, [](int) { return 1; }, [](int, int64_t) { EXPECT(false); });
}

void test_thread_pool() {
  for (const int threads : {1, 2, 5, 3}) {
    set_num_threads(threads);
    EXPECT(get_num_threads() == threads);
    test_parallel_tasks(pool_parallel_for);
    test_parallel_phases(pool_parallel_for);
    // Nested regions run in the thread that meets them.
    std::atomic<int> inner{0};
    pool_parallel_for(0, 8, 1, [&](int64_t begin, int64_t end) {
      pool_parallel_for(begin, end, 1,
                        [&](int64_t b, int64_t e) { inner += static_cast<int>(e - b); });
    });
    EXPECT(inner == 8);
  }
  // Callers from several threads: one gets the pool, the others work alone, all finish.
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 200; ++repeat) {
        pool_parallel_for(0, 10, 3, [&](int64_t begin, int64_t end) { sum += end - begin; });
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  EXPECT(sum == 4 * 200 * 10);
  EXPECT_THROWS(set_num_threads(0), "set_num_threads: n must be in [1, 1024], got 0");
}

void test_isas() {
  const std::string before = cpu_isa_name(current_cpu_isa());
  std::vector<float> x(10007);
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(i);
  }
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(cpu_isa_name(isa));
    EXPECT(current_cpu_isa() == isa);
    EXPECT(std::string(selftest_table().isa) == cpu_isa_name(isa));
    selftest_table().run({x.data(), y.data(), static_cast<int64_t>(x.size())}, thread_for);
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT(y[i] == 2 * x[i] + 1);
    }
  }
  EXPECT_THROWS(set_cpu_isa("mmx"), "name must be one of");
  set_cpu_isa(before);
}

void test_exp() {
  using portable::exp_nonpositive;
  for (float x = -87.3F; x <= 0; x += 0.0007F) {
    const double exact = std::exp(static_cast<double>(x));
    EXPECT(std::fabs(exp_nonpositive(x) - exact) <= 2.0 * exact * 0x1p-24);
  }
  EXPECT(exp_nonpositive(0.0F) == 1.0F);
  EXPECT(exp_nonpositive(-90.0F) == 0.0F);
  EXPECT(exp_nonpositive(-std::numeric_limits<float>::infinity()) == 0.0F);
  EXPECT(std::isnan(exp_nonpositive(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace

int main() {
  test_check();
  test_buffer();
  test_mappings(serial_for);
  test_mappings(thread_for);
  test_parallel_tasks(serial_for);
  test_parallel_tasks(thread_for);
  test_parallel_phases(serial_for);
  test_parallel_phases(thread_for);
  test_thread_pool();
  test_isas();
  test_exp();
  return testing::report("common");
}
