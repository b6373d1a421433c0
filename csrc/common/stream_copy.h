// SPDX-License-Identifier: Apache-2.0
// Copies past the caches, for what is read again only when the caches have long lost it: no line is
// fetched in order to be overwritten, and none that is needed is driven out.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace pydense::PYDENSE_ISA {

// A copy is past the caches where whole lines are written. Every thread that has called this calls
// end_of_stream() before others read.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
#if defined(__AVX__)
  constexpr int64_t kLine = 64;
  if (reinterpret_cast<uintptr_t>(to) % kLine == 0) {
    auto* const target = static_cast<char*>(to);
    const auto* const source = static_cast<const char*>(from);
    const int64_t whole = bytes / kLine * kLine;
    for (int64_t i = 0; i < whole; i += static_cast<int64_t>(sizeof(__m256i))) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i), load<__m256i>(source + i));
    }
    to = target + whole;
    from = source + whole;
    bytes -= whole;
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

inline void end_of_stream() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

}  // namespace pydense::PYDENSE_ISA
