// SPDX-License-Identifier: Apache-2.0
// The few lines these tests need: EXPECT counts failures, THROWS wants an exception with a text,
// and thread_for is a ParallelFor whose threads the sanitizers see.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace testing {

inline int failures = 0;

#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++::testing::failures;                                              \
    }                                                                     \
  } while (false)

template <class Fn>
std::string message_of(const Fn& fn) {
  try {
    fn();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

#define EXPECT_THROWS(expression, text)                                              \
  EXPECT(::testing::message_of([&] { static_cast<void>(expression); }).find(text) != \
         std::string::npos)

inline void thread_for(int64_t begin, int64_t end, int64_t /*grain*/, pydense::RangeFn fn) {
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < kThreads; ++t) {
    const int64_t first = begin + (end - begin) * t / kThreads;
    const int64_t last = begin + (end - begin) * (t + 1) / kThreads;
    if (first < last) {
      threads.emplace_back([=] { fn(first, last); });
    }
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace testing
