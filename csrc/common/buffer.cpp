// SPDX-License-Identifier: Apache-2.0
#include "common/buffer.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace pydense {

Buffer::Buffer(size_t bytes, Lifetime lifetime) : bytes_(bytes) {
  if (bytes == 0) {
    return;
  }
  if (bytes >= kMinMappedBytes) {
    const Mapping mapping = map_memory(bytes, lifetime);
    data_ = mapping.data;
    mapped_ = mapping.bytes;
  } else {
    constexpr size_t kAlignment = 64;
    data_ = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  }
  if (data_ == nullptr) {
    throw std::bad_alloc();
  }
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

Buffer::~Buffer() {
  if (mapped_ > 0) {
    unmap_memory({data_, mapped_});
  } else {
    std::free(data_);
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
