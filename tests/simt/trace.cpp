// SPDX-License-Identifier: Apache-2.0
// Watches every load and store of a kernel: kernels are compiled with -fsanitize=thread, and the
// functions that this flag calls are defined here instead of linking the sanitizer. Finds races in
// shared and global memory (barrier epochs, and a vector clock per lane for __syncwarp), accesses
// outside of buffers, misaligned ones; counts requests.
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string_view>

#include "counters.h"
#include "request_counter.h"
#include "simt.h"

namespace simt {
namespace {

constexpr size_t kRedZone = 256;  // what test buffers leave free on both sides

struct Access {
  const void* from;
  uint32_t block;  // counted over all launches from 1; 0 for none
  uint32_t epoch;  // barriers that the block had passed
  uint32_t clock;  // of the lane
  uint16_t thread;
  bool atomic;
  uint64_t number;  // of all accesses
};
struct Cell {
  Access write;
  std::array<Access, 2> reads;  // the last ones, of different threads
};

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory with a cell for each element.
struct Region {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  size_t element = 1;
  std::string name;
  size_t cell_count = 0;
  std::unique_ptr<Cell[], FreeDeleter> cells;

  bool holds(uintptr_t address) const { return address - begin < end - begin; }
  void set(uintptr_t first, size_t bytes, size_t element_bytes) {
    begin = first;
    end = first + bytes;
    element = element_bytes;
    const size_t needed = (bytes + element - 1) / element;
    if (needed > cell_count) {  // zeroed by the system on first use: large buffers cost nothing
      cells.reset(static_cast<Cell*>(std::calloc(needed, sizeof(Cell))));
      cell_count = needed;
    }
  }
};

uintptr_t program_base() {
  uintptr_t base = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* program, size_t /*size*/, void* result) {
        *static_cast<uintptr_t*>(result) = program->dlpi_addr;
        return 1;  // the first is the program itself
      },
      &base);
  return base;
}

std::string source_line(const void* address) {
  std::array<char, 512> file{};
  if (readlink("/proc/self/exe", file.data(), file.size() - 1) <= 0) {
    return "?";
  }
  std::array<char, 800> command{};
  // The innermost inlined function that is the kernel's own.
  std::snprintf(command.data(), command.size(),
                "addr2line -i -s -e '%s' %#zx | grep -vE "
                "'^(simt|cuda_names|cuda|wgmma_emulation)\\.' | head -1",
                file.data(),
                static_cast<size_t>(reinterpret_cast<uintptr_t>(address) - program_base() - 1));
  std::array<char, 400> line{};
  if (FILE* pipe = popen(command.data(), "r")) {
    if (std::fgets(line.data(), line.size(), pipe) == nullptr) {
      line[0] = '\0';
    }
    pclose(pipe);
  }
  line[std::strcspn(line.data(), " \n")] = '\0';
  return line.data();
}

class Trace final : public Observer {
 public:
  void launch_begins(const char* kernel) override {
    // Of `(scale_kernel<T, 4>)` the name.
    const std::string_view text(kernel);
    const size_t begin = text.find_first_not_of("( ");
    counter_ =
        &counters_[std::string(text.substr(begin, text.find_first_of("<) ", begin) - begin))];
    first_block_ = block_ + 1;
    random_ = config().seed * 2654435761U + 88172645463325252U;
    on_ = true;
  }

  void block_begins(void* fixed, size_t fixed_bytes, void* dynamic, size_t dynamic_bytes) override {
    ++block_;
    epoch_ = 0;
    std::memset(clocks_.data(), 0, sizeof(clocks_));
    for (auto& warp : clocks_) {
      for (size_t lane = 0; lane < 32; ++lane) {
        warp[lane][lane] = 1;
      }
    }
    fixed_.set(reinterpret_cast<uintptr_t>(fixed), fixed_bytes, 1);
    dynamic_.set(reinterpret_cast<uintptr_t>(dynamic), dynamic_bytes, 1);
    if (counting_) {
      counter_->block_begins(dynamic_bytes);
    }
  }

  void barrier() override { ++epoch_; }

  void warp_sync(unsigned warp, unsigned lanes) override {
    std::array<uint32_t, 32> joined{};
    for (size_t lane = 0; lane < 32; ++lane) {
      for (size_t i = 0; i < 32 && (lanes >> lane & 1) != 0; ++i) {
        joined[i] = std::max(joined[i], clocks_[warp][lane][i]);
      }
    }
    for (size_t lane = 0; lane < 32; ++lane) {
      if ((lanes >> lane & 1) != 0) {
        clocks_[warp][lane] = joined;
        clocks_[warp][lane][lane] = joined[lane] + 1;
      }
    }
  }

  void launch_ends() override {
    on_ = false;
    if (counting_) {
      counter_->launch_ends();
    }
  }

  void add_buffer(const void* address, size_t bytes, size_t element, const char* name) override {
    buffers_.emplace_back();
    buffers_.back().set(reinterpret_cast<uintptr_t>(address), bytes, element);
    buffers_.back().name = name;
  }

  void drop_buffer(const void* address) override {
    std::erase_if(buffers_, [&](const Region& buffer) {
      return buffer.begin == reinterpret_cast<uintptr_t>(address);
    });
  }

  void access(const void* pointer, size_t bytes, bool write, bool atomic,
              const void* from) override {
    if (!on_ || self == nullptr || bytes == 0) {
      return;
    }
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address - reinterpret_cast<uintptr_t>(self->stack) < kStackBytes) {
      return;
    }
    const bool shared = fixed_.holds(address) || dynamic_.holds(address);
    Region* const region = shared ? (fixed_.holds(address) ? &fixed_ : &dynamic_)
                                  : buffer_at(address, bytes, write, from);
    if (region == nullptr) {
      return;  // launch arguments, constants
    }
    if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && address % bytes != 0) {
      fail("misaligned access of " + std::to_string(bytes) + " bytes at " + source_line(from));
    }
    if (address + bytes > region->end) {
      fail("out of bounds: access past the end of shared memory at " + source_line(from));
    }
    if (counting_) {
      counter_->access(from, self->linear, address, bytes, shared, write);
    } else if (config().preempt && one_in_16()) {
      yield_now();
    }
    check_races(*region, address, bytes, shared,
                {from, block_, epoch_, clock_of_self(), static_cast<uint16_t>(self->linear), atomic,
                 ++accesses_},
                write);
  }

  void shown() override { shown_[self->linear] = accesses_; }

  // One of four warps counts: all read the same, once.
  void product_read(const void* pointer, size_t bytes, const void* from) override {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    for (size_t i = 0; on_ && i < bytes; ++i) {
      const Access& write = dynamic_.cells[address - dynamic_.begin + i].write;
      if (write.block == block_ && write.number > shown_[write.thread]) {
        fail("a product at " + source_line(from) + " reads what thread " +
             std::to_string(write.thread) + " wrote at " + source_line(write.from) +
             " and did not show to products");
      }
    }
    if (!counting_ || self->warp % 4 == 0) {
      access(pointer, bytes, false, false, from);
    }
  }

  void matrix_product() override {
    if (on_ && counting_) {
      counter_->matrix_product();
    }
  }

  void basic_block(const void* from) {
    if (on_ && counting_ && self != nullptr) {
      counter_->basic_block(from, self->linear);
    }
  }

  void start_counting() {
    counters_.clear();
    counting_ = true;
  }
  const std::map<std::string, RequestCounter>& stop_counting() {
    counting_ = false;
    return counters_;
  }

 private:
  uint32_t clock_of_self() const { return clocks_[self->warp][self->lane][self->lane]; }

  bool one_in_16() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ % 16 == 0;
  }

  Region* buffer_at(uintptr_t address, size_t bytes, bool write, const void* from) {
    for (Region& buffer : buffers_) {
      if (address + bytes + kRedZone <= buffer.begin || address >= buffer.end + kRedZone) {
        continue;
      }
      if (address < buffer.begin || address + bytes > buffer.end) {
        fail(std::string("out of bounds ") + (write ? "write" : "read") + " of " +
             std::to_string(bytes) + " bytes at byte " +
             std::to_string(static_cast<int64_t>(address - buffer.begin)) + " of " + buffer.name +
             ", which has " + std::to_string(buffer.end - buffer.begin) + ", at " +
             source_line(from));
      }
      return &buffer;
    }
    return nullptr;
  }

  // An earlier access of this run: does it come first in every run?
  bool ordered(const Access& earlier, const Access& now, bool shared) const {
    if (earlier.block != now.block) {
      // Shared memory is another one in each block; launches follow each other.
      return shared || earlier.block < first_block_;
    }
    if (earlier.thread == now.thread || earlier.epoch < now.epoch) {
      return true;
    }
    return earlier.thread / 32 == now.thread / 32 &&
           earlier.clock <= clocks_[now.thread / 32][now.thread % 32][earlier.thread % 32];
  }

  void check_pair(const Access& earlier, bool earlier_writes, const Access& now, bool now_writes,
                  const Region& region, uintptr_t address, bool shared) const {
    if (ordered(earlier, now, shared) || (earlier.atomic && now.atomic)) {
      return;
    }
    const auto describe = [&](const Access& a, bool writes) {
      return std::string(a.atomic ? "atomic " : "") + (writes ? "write" : "read") + " by thread " +
             std::to_string(a.thread) + " of " +
             (a.block == now.block ? "the block" : "another block") + " at " + source_line(a.from);
    };
    fail("race on " +
         (shared ? std::string("shared memory")
                 : region.name + "+" + std::to_string(address - region.begin)) +
         ": " + describe(earlier, earlier_writes) + ", " + describe(now, now_writes));
  }

  void check_races(Region& region, uintptr_t address, size_t bytes, bool shared, const Access& now,
                   bool write) {
    const size_t first = (address - region.begin) / region.element;
    const size_t last = (address + bytes - 1 - region.begin) / region.element;
    for (size_t i = first; i <= last; ++i) {
      Cell& cell = region.cells[i];
      check_pair(cell.write, true, now, write, region, address, shared);
      if (write) {
        for (const Access& read : cell.reads) {
          check_pair(read, false, now, true, region, address, shared);
        }
        cell.write = now;
        if (!now.atomic) {
          cell.reads = {};
        }
      } else {
        if (cell.reads[0].block != now.block || cell.reads[0].thread != now.thread) {
          cell.reads[1] = cell.reads[0];
        }
        cell.reads[0] = now;
      }
    }
  }

  bool on_ = false;
  bool counting_ = false;
  uint32_t block_ = 0;
  uint32_t first_block_ = 1;
  uint64_t accesses_ = 0;
  std::array<uint64_t, 1024> shown_{};  // of each thread, the last access that products may see
  uint32_t epoch_ = 0;
  uint64_t random_ = 1;
  std::array<std::array<std::array<uint32_t, 32>, 32>, 32> clocks_{};  // [warp][lane][of lane]
  Region fixed_, dynamic_;
  std::vector<Region> buffers_;
  std::map<std::string, RequestCounter> counters_;  // by kernel
  RequestCounter* counter_ = nullptr;               // of the running one
};

Trace trace;
[[maybe_unused]] const bool kInstalled = (observer = &trace, true);

}  // namespace

bool counting_is_possible() { return true; }

void start_counting() { trace.start_counting(); }

std::map<std::string, Counted> stop_counting(bool with_lines) {
  std::map<std::string, Counted> found;
  for (const auto& [kernel, counter] : trace.stop_counting()) {
    Counted& counted = found[kernel];
    counted.launches = counter.launches();
    counted.counts = counter.counts();
    for (const auto& [from, line] : counter.lines()) {
      if (with_lines) {
        counted.lines.push_back(
            {source_line(from), line.shared, line.write, line.requests, line.units, line.ideal});
      }
    }
    for (const auto& [from, warps] : counter.basic_blocks()) {
      counted.blocks.push_back({reinterpret_cast<uintptr_t>(from) - program_base(), warps});
    }
  }
  return found;
}

void trace_access(const void* address, size_t bytes, bool write, bool atomic, const void* from) {
  trace.access(address, bytes, write, atomic, from);
}
void trace_basic_block(const void* from) { trace.basic_block(from); }

}  // namespace simt
