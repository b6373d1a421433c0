// SPDX-License-Identifier: Apache-2.0
#include "request_counter.h"

#include <algorithm>
#include <array>

namespace simt {
namespace {

constexpr uintptr_t kSector = 32;
constexpr uintptr_t kWord = 4;
constexpr uintptr_t kBanks = 32;
constexpr unsigned kMaxThreads = 1024;

uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ (b * 0x9E3779B97F4A7C15U)) * 0xFF51AFD7ED558CCDU;
  return x ^ (x >> 32);
}

}  // namespace

void RequestCounter::access(const void* from, unsigned thread, uintptr_t address, size_t bytes,
                            bool shared, bool write) {
  // A read-modify-write comes as a read and a write from one place.
  const uint64_t place = mix(reinterpret_cast<uintptr_t>(from), write ? 1 : 2);
  const uint32_t time = times_[mix(place, thread)]++;
  Request& request = requests_[mix(mix(place, thread / 32), uint64_t{time} + 1000)];
  request.from = from;
  request.shared = shared;
  request.write = write;
  request.parts.push_back(
      {address, static_cast<uint8_t>(bytes), static_cast<uint8_t>(thread % 32)});
}

void RequestCounter::basic_block(const void* from, unsigned thread) {
  auto& times = block_times_[from];
  times.resize(kMaxThreads);
  ++times[thread];
}

void RequestCounter::finish(const Request& request) {
  Line& line = lines_[request.from];
  line.shared = request.shared;
  line.write = request.write;
  ++line.requests;
  uint64_t units = 0;
  uint64_t ideal = 0;
  if (request.shared) {
    // Wide accesses go in groups of lanes: all 32 for 4 bytes, 16 for 8, 8 for 16.
    size_t widest = kWord;
    for (const Part& part : request.parts) {
      widest = std::max<size_t>(widest, part.bytes);
    }
    const unsigned lanes = static_cast<unsigned>(32 * kWord / widest);
    for (unsigned first = 0; first < 32; first += lanes) {
      std::array<std::vector<uintptr_t>, kBanks> words;
      bool any = false;
      for (const Part& part : request.parts) {
        if (part.lane < first || part.lane >= first + lanes) {
          continue;
        }
        any = true;
        for (uintptr_t w = part.address / kWord; w <= (part.address + part.bytes - 1) / kWord;
             ++w) {
          auto& bank = words[w % kBanks];
          if (std::find(bank.begin(), bank.end(), w) == bank.end()) {
            bank.push_back(w);
          }
        }
      }
      size_t passes = 0;
      for (const auto& bank : words) {
        passes = std::max(passes, bank.size());
      }
      units += passes;
      ideal += any ? 1 : 0;
    }
    ++counts_.shared_requests;
    counts_.wavefronts += units;
    counts_.ideal_wavefronts += ideal;
  } else {
    std::vector<uintptr_t> sectors;
    std::vector<uintptr_t> bytes;
    for (const Part& part : request.parts) {
      for (uintptr_t byte = part.address; byte < part.address + part.bytes; ++byte) {
        bytes.push_back(byte);
        sectors.push_back(byte / kSector);
      }
    }
    const auto distinct = [](std::vector<uintptr_t>& values) {
      std::sort(values.begin(), values.end());
      values.erase(std::unique(values.begin(), values.end()), values.end());
      return values.size();
    };
    units = distinct(sectors);
    ideal = (distinct(bytes) + kSector - 1) / kSector;
    (request.write ? written_ : read_).insert(sectors.begin(), sectors.end());
    ++counts_.requests;
    counts_.sectors += units;
    counts_.ideal_sectors += ideal;
  }
  line.units += units;
  line.ideal += ideal;
}

void RequestCounter::block_begins(size_t dynamic_shared) {
  block_ends();
  counts_.dynamic_shared = std::max<uint64_t>(counts_.dynamic_shared, dynamic_shared);
}

void RequestCounter::block_ends() {
  for (const auto& [key, request] : requests_) {
    finish(request);
  }
  requests_.clear();
  times_.clear();
  for (auto& [from, times] : block_times_) {
    for (size_t warp = 0; warp < times.size(); warp += 32) {
      const auto first = times.begin() + static_cast<std::ptrdiff_t>(warp);
      block_totals_[from] += *std::max_element(first, first + 32);
    }
    std::fill(times.begin(), times.end(), 0);
  }
}

void RequestCounter::launch_ends() {
  block_ends();
  ++launches_;
  counts_.moved_bytes += kSector * (read_.size() + written_.size());
  read_.clear();
  written_.clear();
}

}  // namespace simt
