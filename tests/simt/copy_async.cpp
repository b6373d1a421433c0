// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <vector>

#include "mma_emulation.h"

namespace simt {
namespace {

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int group;
};
struct Queue {
  std::vector<Copy> copies;
  int group = 0;
  uint64_t block = 0;  // that it belongs to
};

Queue& queue_of_self() {
  static std::array<Queue, 1024> queues;
  Queue& queue = queues[self->linear];
  const uint64_t block = stats().blocks_begun;
  if (queue.block != block) {
    queue = Queue{.copies = {}, .group = 0, .block = block};
  }
  return queue;
}

void land(const Copy& copy) {
  alignas(16) std::array<uint64_t, 2> bytes{};
  if (copy.valid) {
    load(bytes.data(), copy.from, sizeof(bytes));
  }
  store(copy.to, bytes.data(), sizeof(bytes));
}

}  // namespace

void copy_async_16(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
    fail("cp.async: addresses must be multiples of 16 bytes");
  }
  Queue& queue = queue_of_self();
  const Copy copy = {to, from, valid, queue.group};
  if (config().seed % 2 == 1) {
    land(copy);
  } else {
    queue.copies.push_back(copy);
  }
}

void copy_async_commit() { ++queue_of_self().group; }

void copy_async_wait(int pending) {
  Queue& queue = queue_of_self();
  size_t kept = 0;
  for (size_t i = 0; i < queue.copies.size(); ++i) {  // no memory of its own while fibers switch
    const Copy copy = queue.copies[i];
    if (copy.group < queue.group - pending) {
      land(copy);
    } else {
      queue.copies[kept++] = copy;
    }
  }
  queue.copies.resize(kept);
}

}  // namespace simt
