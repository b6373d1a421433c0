// SPDX-License-Identifier: Apache-2.0
#include "common/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "common/check.h"

namespace pydense {
namespace {

constexpr int kMaxThreads = 1024;

// Set in a forked child, where the parent's workers do not exist.
std::atomic<bool> forked{false};
thread_local bool inside_region = false;

int usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return CPU_COUNT(&set);
  }
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

int checked_count(int64_t n, const char* name) {
  PYDENSE_CHECK(n >= 1 && n <= kMaxThreads, name, " must be in [1, ", kMaxThreads, "], got ", n);
  return static_cast<int>(n);
}

int initial_threads() {
  const char* wanted = std::getenv("PYDENSE_NUM_THREADS");  // NOLINT(concurrency-mt-unsafe)
  if (wanted == nullptr || *wanted == '\0') {
    return usable_cpus();
  }
  char* end = nullptr;
  const int64_t n = std::strtoll(wanted, &end, 10);
  PYDENSE_CHECK(*end == '\0', "PYDENSE_NUM_THREADS must be a whole number, got '", wanted, "'");
  return checked_count(n, "PYDENSE_NUM_THREADS");
}

class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads) {}
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() { stop_workers(); }

  int threads() const { return threads_; }

  void resize(int threads) {
    const std::lock_guard<std::mutex> region(region_mutex_);
    stop_workers();
    threads_ = threads;
  }

  // False when the pool is busy: the caller then works alone.
  bool try_run(int64_t begin, int64_t end, int64_t grain, RangeFn fn) {
    const std::unique_lock<std::mutex> region(region_mutex_, std::try_to_lock);
    if (!region.owns_lock()) {
      return false;
    }
    start_workers();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = {&fn, end, grain};
      next_ = begin;
      active_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    wake_.notify_all();
    work(job_);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return active_ == 0; });
    return true;
  }

 private:
  struct Job {
    const RangeFn* fn;
    int64_t end;
    int64_t grain;
  };

  void work(const Job& job) {
    inside_region = true;
    for (;;) {
      const int64_t first = next_.fetch_add(job.grain, std::memory_order_relaxed);
      if (first >= job.end) {
        break;
      }
      (*job.fn)(first, std::min(first + job.grain, job.end));
    }
    inside_region = false;
  }

  void worker_loop(uint64_t seen) {
    for (;;) {
      Job job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) {
          return;
        }
        seen = generation_;
        job = job_;
      }
      work(job);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        --active_;
      }
      done_.notify_one();
    }
  }

  void start_workers() {
    while (static_cast<int>(workers_.size()) < threads_ - 1) {
      try {
        workers_.emplace_back([this, seen = generation_] { worker_loop(seen); });
      } catch (const std::system_error&) {
        break;  // the system grants no more threads: work with those there are
      }
    }
  }

  void stop_workers() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) {
      worker.join();
    }
    workers_.clear();
    stop_ = false;
  }

  std::mutex region_mutex_;  // held for a whole parallel region
  std::mutex mutex_;         // guards what follows
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> next_{0};
  Job job_{};
  uint64_t generation_ = 0;
  int active_ = 0;
  bool stop_ = false;
  std::atomic<int> threads_;
};

ThreadPool& pool() {
  // Never destroyed: workers may still sleep in it while the process exits.
  static ThreadPool* const instance = [] {
    auto created = std::make_unique<ThreadPool>(initial_threads());
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return created.release();
  }();
  return *instance;
}

}  // namespace

int get_num_threads() { return forked ? 1 : pool().threads(); }

void set_num_threads(int64_t n) {
  const int threads = checked_count(n, "set_num_threads: n");
  if (!forked) {
    pool().resize(threads);
  }
}

void pool_parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn) {
  if (begin >= end) {
    return;
  }
  grain = std::max<int64_t>(grain, 1);
  const bool alone = inside_region || forked || end - begin <= grain || pool().threads() == 1;
  if (alone || !pool().try_run(begin, end, grain, fn)) {
    fn(begin, end);
  }
}

}  // namespace pydense
