// SPDX-License-Identifier: Apache-2.0
#include "common/buffer.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace pydense {
namespace {

constexpr size_t kAlignment = 64;

// AddressSanitizer watches the borders of what it allocates itself.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

constexpr size_t kPage = 65536;  // the largest there is; smaller ones divide it
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = size_t{256} << 10;

// Large buffers are mapped by themselves, so that a freed one leaves no hole in the heap, and on
// huge pages: rows are walked in lattice order, where 4 KB pages miss the TLB on nearly every row,
// and faulting such pages in costs as much as filling them. The end of a buffer gets a huge page of
// its own if it fills half of it.
size_t mapped_bytes(size_t bytes) {
  const size_t rest = bytes % kHugePage;
  const size_t unit = rest >= kHugePage / 2 ? kHugePage : kPage;
  return (bytes + unit - 1) / unit * unit;
}

void* allocate_large(size_t bytes) {
  if (bytes > SIZE_MAX / 2) {
    return nullptr;
  }
  const size_t size = mapped_bytes(bytes);
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

void release(void* data, size_t bytes) {
  if (bytes >= kLarge) {
    munmap(data, mapped_bytes(bytes));
  } else {
    std::free(data);
  }
}

#else

constexpr size_t kLarge = SIZE_MAX;

void* allocate_large(size_t /*bytes*/) { return nullptr; }

void release(void* data, size_t /*bytes*/) { std::free(data); }

#endif

void* allocate(size_t bytes) {
  if (bytes == 0) {
    return nullptr;
  }
  void* data = nullptr;
  if (bytes >= kLarge) {
    data = allocate_large(bytes);
  } else {
    data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  }
  if (data == nullptr) {
    throw std::bad_alloc();
  }
  return data;
}

}  // namespace

Buffer::Buffer(size_t bytes) : data_(allocate(bytes)), bytes_(bytes) {}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr) {
    release(data_, bytes_);
  }
}

void Buffer::grow(size_t bytes, size_t keep) {
  if (bytes <= bytes_) {
    return;
  }
  Buffer larger(bytes);
  if (keep > 0) {
    std::memcpy(larger.data_, data_, keep);
  }
  *this = std::move(larger);
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
  auto* const first = static_cast<char*>(data);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(first) % kHugePage) % kHugePage;
  if (bytes >= before + kHugePage) {
    const size_t whole = (bytes - before) / kHugePage * kHugePage;
    static_cast<void>(madvise(first + before, whole, MADV_HUGEPAGE));
  }
#endif
}

Buffer BufferPool::take(size_t bytes) {
  Buffer buffer;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      buffer = std::move(free_.back());
      free_.pop_back();
    }
  }
  buffer.grow(bytes, 0);
  return buffer;
}

void BufferPool::give_back(Buffer buffer) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(buffer));
  } catch (const std::bad_alloc&) {
    buffer = Buffer();  // no room to keep it
  }
}

size_t checked_bytes(size_t count, size_t size) {
  size_t bytes = 0;
  if (__builtin_mul_overflow(count, size, &bytes)) {
    throw std::bad_alloc();
  }
  return bytes;
}

}  // namespace pydense
