// SPDX-License-Identifier: Apache-2.0
// Uninitialised, 64-byte aligned memory. Not a template and not inline on purpose: units compiled
// for different instruction sets share it.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "common/mapping.h"

namespace pydense {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes, Lifetime lifetime = Lifetime::kCall);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  // Makes room for `bytes`, for a call, keeping the first `keep` bytes. Never shrinks.
  void grow(size_t bytes, size_t keep);

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  size_t mapped_ = 0;  // bytes of the mapping, 0 on the heap
};

// Buffers that tasks use one after the other: getting fresh pages from the system costs more than
// what many a task does with them.
class BufferPool {
 public:
  Buffer take(size_t bytes);  // at least
  void give_back(Buffer buffer) noexcept;

 private:
  std::mutex mutex_;
  std::vector<Buffer> free_;
};

// count * size, or std::bad_alloc where that does not fit in memory at all.
size_t checked_bytes(size_t count, size_t size);

template <class T>
Buffer buffer_of(size_t count) {
  return Buffer(checked_bytes(count, sizeof(T)));
}

}  // namespace pydense
