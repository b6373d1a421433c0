// SPDX-License-Identifier: Apache-2.0
#include "common/buffer.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace pydense {
namespace {

constexpr size_t kAlignment = 64;

void* allocate(size_t bytes) {
  if (bytes == 0) {
    return nullptr;
  }
  if (bytes > SIZE_MAX - kAlignment) {
    throw std::bad_alloc();
  }
  void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
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
