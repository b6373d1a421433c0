// SPDX-License-Identifier: Apache-2.0
#include "common/mapping.h"

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "common/check.h"

namespace pydense {
namespace {

// What a training step over a batch keeps for its backward pass must come back in the next step,
// or the system fills as many pages again: hence a part of the machine's memory.
size_t default_kept_bytes() {
  constexpr uint64_t kLeast = uint64_t{256} << 20;
#ifdef __linux__
  const int64_t pages = sysconf(_SC_PHYS_PAGES);
  const int64_t page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) {
    constexpr uint64_t kMost = uint64_t{4} << 30;
    const uint64_t part = static_cast<uint64_t>(pages) / 16 * static_cast<uint64_t>(page);
    return static_cast<size_t>(std::min<uint64_t>(std::clamp(part, kLeast, kMost), SIZE_MAX / 4));
  }
#endif
  return kLeast;
}

}  // namespace

size_t max_kept_bytes() {
  static const size_t bytes = [] {
    const char* wanted = std::getenv("PYDENSE_CACHE_MIB");  // NOLINT(concurrency-mt-unsafe)
    if (wanted == nullptr || *wanted == '\0') {
      return default_kept_bytes();
    }
    constexpr int64_t kMost = int64_t{1} << 30;
    char* end = nullptr;
    const int64_t mib = std::strtoll(wanted, &end, 10);
    PYDENSE_CHECK(*end == '\0' && mib >= 0 && mib <= kMost,
                  "PYDENSE_CACHE_MIB must be a whole number from 0 to ", kMost, ", got '", wanted,
                  "'");
    return static_cast<size_t>(mib) << 20;
  }();
  return bytes;
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

namespace {

constexpr size_t kPage = 65536;  // the largest there is; smaller ones divide it
constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kMaxRanges = 128;

size_t ceil_div(size_t n, size_t by) { return (n + by - 1) / by; }

// The end of a fresh mapping gets a huge page of its own if it fills half of it.
size_t rounded(size_t bytes) {
  const size_t rest = bytes % kHugePage;
  const size_t unit = rest >= kHugePage / 2 ? kHugePage : kPage;
  return ceil_div(bytes, unit) * unit;
}

// On huge pages: rows are walked in lattice order, where 4 KB pages miss the TLB on nearly every
// row.
void* map_fresh(size_t size) {
  void* mapping =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {  // NOLINT(performance-no-int-to-ptr): the system's definition
    return nullptr;
  }
  auto* const start = static_cast<char*>(mapping);
  const size_t skipped = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (skipped > 0) {
    munmap(start, skipped);
  }
  if (skipped < kHugePage) {
    munmap(start + skipped + size, kHugePage - skipped);
  }
  static_cast<void>(madvise(start + skipped, size, MADV_HUGEPAGE));
  return start + skipped;
}

// The memory that nobody uses, in ranges, in the order in which they came or grew. A request is
// served from the smallest range that is large enough, from its start for a call, from its end for
// longer, and what comes back grows together with its neighbours: the phases of a call, whose
// pieces have other sizes each, use the same pages.
class KeptMappings {
 public:
  Mapping take(size_t size, Lifetime lifetime) {
    max_kept_ = max_kept_bytes();
    Mapping found = {nullptr, size};
    const int best = smallest(size);
    if (best >= 0) {
      found = part(best, size, lifetime);
    }
    in_use_ += found.bytes;
    most_ = std::max(most_, in_use_);
    make_room();
    return found;
  }

  void give_back(Mapping mapping) {
    in_use_ -= mapping.bytes;
    Mapping whole = mapping;
    for (int i = 0; i < count_;) {
      if (end_of(kept_[i]) == whole.data || kept_[i].data == end_of(whole)) {
        const Mapping other = remove(i);
        whole = {std::min(whole.data, other.data), whole.bytes + other.bytes};
      } else {
        ++i;
      }
    }
    may_be_taken(mapping, whole);
    kept_[count_++] = whole;
    kept_bytes_ += whole.bytes;
    if (count_ > kMaxRanges) {
      drop(smallest(0));
    }
    make_room();
  }

  // Of a mapping that did not come to be.
  void forget(size_t size) { in_use_ -= size; }

  void drop_all() {
    while (count_ > 0) {
      drop(0);
    }
    most_ = in_use_;
  }

  MappedBytes bytes() const { return {in_use_, kept_bytes_}; }

 private:
  static char* end_of(const Mapping& mapping) {
    return static_cast<char*>(mapping.data) + mapping.bytes;
  }

  // Of the huge pages that are wholly free now that `mapping` is, in its range: the system takes
  // these first when memory is short; where it does not, using them again faults nothing in. (Part
  // of a huge page would take it apart.) Not for smaller pieces, which tasks take and give back one
  // after the other: a system call each time costs more than some of them compute.
  static void may_be_taken(const Mapping& mapping, const Mapping& range) {
    if (mapping.bytes < kHugePage) {
      return;
    }
    const auto from = [](const void* at) { return reinterpret_cast<uintptr_t>(at); };
    const uintptr_t begin =
        std::max(from(mapping.data) / kHugePage, ceil_div(from(range.data), kHugePage));
    const uintptr_t end =
        std::min(ceil_div(from(end_of(mapping)), kHugePage), from(end_of(range)) / kHugePage);
    if (begin < end) {
      char* const first = static_cast<char*>(range.data) + (begin * kHugePage - from(range.data));
      static_cast<void>(madvise(first, (end - begin) * kHugePage, MADV_FREE));
    }
  }

  // Until no more is kept than may be. What costs least to get again goes: the end of the smallest
  // range that is large enough, or else the oldest.
  void make_room() {
    while (count_ > 0) {
      const size_t all = in_use_ + kept_bytes_;
      const size_t excess = std::max(all > most_ ? all - most_ : 0,
                                     kept_bytes_ > max_kept_ ? kept_bytes_ - max_kept_ : 0);
      if (excess == 0) {
        return;
      }
      const int best = smallest(excess);
      if (best < 0) {
        drop(0);
      } else {
        drop_end(best, excess);
      }
    }
  }

  // The oldest of the smallest ranges of at least so many bytes, or -1.
  int smallest(size_t least) const {
    int best = -1;
    for (int i = 0; i < count_; ++i) {
      if (kept_[i].bytes >= least && (best < 0 || kept_[i].bytes < kept_[best].bytes)) {
        best = i;
      }
    }
    return best;
  }

  // Bytes of a range; all of them where the rest would be of no use.
  Mapping part(int i, size_t size, Lifetime lifetime) {
    Mapping& range = kept_[i];
    if (range.bytes - size < kMinMappedBytes) {
      return remove(i);
    }
    range.bytes -= size;
    kept_bytes_ -= size;
    if (lifetime == Lifetime::kTensor) {
      return {end_of(range), size};
    }
    const Mapping found = {range.data, size};
    range.data = end_of(found);
    return found;
  }

  Mapping remove(int i) {
    const Mapping mapping = kept_[i];
    std::copy(kept_ + i + 1, kept_ + count_, kept_ + i);
    --count_;
    kept_bytes_ -= mapping.bytes;
    return mapping;
  }

  void drop(int i) {
    const Mapping mapping = remove(i);
    munmap(mapping.data, mapping.bytes);
  }

  // At least so many bytes, back to the border of a huge page; all where little would be left.
  void drop_end(int i, size_t bytes) {
    Mapping& range = kept_[i];
    const auto end = reinterpret_cast<uintptr_t>(end_of(range));
    const size_t gone = end - (end - bytes) / kHugePage * kHugePage;
    if (range.bytes < gone + kMinMappedBytes) {
      return drop(i);
    }
    range.bytes -= gone;
    kept_bytes_ -= gone;
    munmap(end_of(range), gone);
  }

  Mapping kept_[kMaxRanges + 1];  // the last one for a moment
  int count_ = 0;
  size_t kept_bytes_ = 0;
  size_t max_kept_ = 0;
  size_t in_use_ = 0;
  size_t most_ = 0;  // ever in use at a time
};

std::mutex mutex;  // no destructor: threads may outlive main
KeptMappings kept;

// A fork must not happen while another thread is inside: the child would find the mutex locked.
void lock() noexcept { mutex.lock(); }
void unlock() noexcept { mutex.unlock(); }
[[maybe_unused]] const int kForkHook = pthread_atfork(lock, unlock, unlock);

}  // namespace

const size_t kMinMappedBytes = size_t{64} << 10;

Mapping map_memory(size_t bytes, Lifetime lifetime) {
  if (bytes > SIZE_MAX / 8) {
    return {};
  }
  const size_t size = rounded(bytes);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const Mapping found = kept.take(size, lifetime); found.data != nullptr) {
      return found;
    }
  }
  void* data = map_fresh(size);
  if (data == nullptr) {
    drop_kept_mappings();
    data = map_fresh(size);
  }
  if (data == nullptr) {
    const std::lock_guard<std::mutex> lock(mutex);
    kept.forget(size);
    return {};
  }
  return {data, size};
}

void unmap_memory(Mapping mapping) noexcept {
  const std::lock_guard<std::mutex> lock(mutex);
  kept.give_back(mapping);
}

void drop_kept_mappings() noexcept {
  const std::lock_guard<std::mutex> lock(mutex);
  kept.drop_all();
}

MappedBytes mapped_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  return kept.bytes();
}

#else

const size_t kMinMappedBytes = SIZE_MAX;

Mapping map_memory(size_t /*bytes*/, Lifetime /*lifetime*/) { return {}; }
void unmap_memory(Mapping /*mapping*/) noexcept {}
void drop_kept_mappings() noexcept {}
MappedBytes mapped_bytes() { return {0, 0}; }

#endif

}  // namespace pydense
