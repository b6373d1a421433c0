// SPDX-License-Identifier: Apache-2.0
// Large pieces of memory, apart from the heap and used again: faulting fresh pages in costs as
// much as filling them. Pages that are kept serve pieces of any size, so that the phases of a call
// share them.
#pragma once

#include <cstddef>

namespace pydense {

struct Mapping {
  void* data = nullptr;
  size_t bytes = 0;  // at least what was asked for
};

// Requests from here on are worth a mapping. None are where the system has none, or where
// AddressSanitizer is to watch the borders of what it allocates itself.
extern const size_t kMinMappedBytes;

// Until a call ends, or as long as a tensor, a lattice. The two are kept apart, so that what ends
// together is one piece again.
enum class Lifetime { kCall, kTensor };

// Uninitialised memory, fresh one on huge pages where the system has them, or {nullptr, 0} where
// there is none.
Mapping map_memory(size_t bytes, Lifetime lifetime);

// Keeps the pages for later requests, as long as all pages, in use and kept, are no more than were
// ever in use at a time (whole, also where less was asked for), and no more than max_kept_bytes()
// are kept. The system may take huge pages
// that are kept where it runs short.
void unmap_memory(Mapping mapping) noexcept;

// A sixteenth of the machine's memory, 256 MiB to 4 GiB, or what PYDENSE_CACHE_MIB says; 0: every
// mapping is a fresh one. Throws std::invalid_argument where that is not a number of MiB.
size_t max_kept_bytes();

// Gives all kept mappings back to the system, and forgets how much was in use before.
void drop_kept_mappings() noexcept;

// Bytes in use, and bytes kept.
struct MappedBytes {
  size_t in_use;
  size_t kept;
};
MappedBytes mapped_bytes();

}  // namespace pydense
