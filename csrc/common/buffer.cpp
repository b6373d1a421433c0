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
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = 2 * kHugePage;

void* allocate(size_t bytes) {
  if (bytes == 0) {
    return nullptr;
  }
  const size_t alignment = bytes >= kLarge ? kHugePage : kAlignment;
  if (bytes > SIZE_MAX - alignment) {
    throw std::bad_alloc();
  }
  void* data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (data == nullptr) {
    throw std::bad_alloc();
  }
#ifdef __linux__
  if (bytes >= kLarge) {
    // Rows are walked in lattice order: with 4 KB pages nearly every row misses the TLB, and
    // faulting the pages in costs as much as filling them.
    static_cast<void>(madvise(data, bytes, MADV_HUGEPAGE));
  }
#endif
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

Buffer::~Buffer() { std::free(data_); }

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

size_t checked_bytes(size_t count, size_t size) {
  size_t bytes = 0;
  if (__builtin_mul_overflow(count, size, &bytes)) {
    throw std::bad_alloc();
  }
  return bytes;
}

}  // namespace pydense
