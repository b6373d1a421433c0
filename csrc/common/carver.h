// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace pydense {

// Arrays one after another in a workspace; without one, their size alone.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class E>
  E* take(int64_t count) {
    constexpr size_t kAlign = 256;
    char* const at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(E) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<E*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace pydense
