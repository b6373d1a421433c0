// SPDX-License-Identifier: Apache-2.0
#include "wgmma_emulation.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "machine.h"

namespace simt {
namespace {

constexpr unsigned kMostGroups = 8;  // of 8 columns

struct Product {
  Operands operands;
  float* d;
  unsigned groups;
  const uint32_t* registers;                 // of A, the thread's own
  std::array<std::array<uint32_t, 4>, 4> a;  // of the four lanes that have the thread's rows
  uint64_t b;
  int group;
  bool begins;  // the first under way of its D, which is kept meanwhile
  std::array<float, kMostGroups * 4> kept;
  const void* from;
};
struct Queue {
  std::vector<Product> products;
  std::vector<uint64_t> groups;  // what was issued in each, of a warp's first lane
  uint64_t issued = 0;
  int group = 0;
  bool fenced = false;
  uint64_t block = 0;  // that it belongs to
};
std::array<Queue, kMaxThreads> queues;

Queue& queue_of(unsigned thread) {
  Queue& queue = queues[thread];
  const uint64_t block = stats().blocks_begun;
  if (queue.block != block) {
    queue = Queue{};
    queue.block = block;
  }
  return queue;
}

uint32_t shared_base() { return 1024 + config().seed % 64 * 16; }

// 16 bytes of row `row` of B, the left or the right ones.
const unsigned char* vector_of(uint64_t b, unsigned row, unsigned right) {
  const auto bits = [b](unsigned first, unsigned count) {
    return static_cast<uint32_t>(b >> first & ((uint64_t{1} << count) - 1));
  };
  const uint32_t begin = bits(0, 14) << 4;
  const uint32_t eight_rows = bits(32, 14) << 4;
  const uint32_t mode = bits(62, 2);
  if (mode == 0 || bits(49, 3) != 0) {
    fail("wgmma: emulated are swizzled operands that begin where the pattern does");
  }
  const uint32_t row_bytes = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  if (begin % (8 * row_bytes) >= row_bytes) {
    fail("wgmma: the first row must lie at a multiple of " + std::to_string(8 * row_bytes) +
         " bytes");
  }
  uint32_t address = begin + row / 8 * eight_rows + row % 8 * row_bytes + 16 * right;
  // Of the bits from 4 on as many as there are vectors in a row, by the bits from 7 on.
  address ^= (address >> 7 & (row_bytes / 16 - 1)) << 4;
  const uint32_t offset = address - shared_base();
  if (address < shared_base() || offset + 16 > machine.dynamic_bytes) {
    fail("wgmma: an operand lies outside of the block's shared memory");
  }
  return machine.dynamic_shared + offset;
}

float element(Operands operands, const unsigned char* vector, unsigned i) {
  if (operands == Operands::kBfloat16) {
    uint16_t bits;
    std::memcpy(&bits, vector + 2 * i, sizeof(bits));
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  uint32_t bits;
  std::memcpy(&bits, vector + 4 * i, sizeof(bits));
  return __builtin_bit_cast(float, bits & ~0x1FFFU);
}

// D += A B of the thread's elements.
void multiply(const Product& p, float* d) {
  const unsigned numbers = p.operands == Operands::kBfloat16 ? 8 : 4;  // in 16 bytes
  std::array<std::array<float, 16>, 2> a;                              // rows
  for (unsigned k = 0; k < 2 * numbers; ++k) {
    for (unsigned r = 0; r < 2; ++r) {
      if (p.operands == Operands::kBfloat16) {
        const uint32_t pair = p.a[k % 8 / 2][r + k / 8 * 2];
        a[r][k] = __builtin_bit_cast(float, k % 2 != 0 ? pair & 0xFFFF0000U : pair << 16);
      } else {
        a[r][k] = __builtin_bit_cast(float, p.a[k % 4][r + k / 4 * 2] & ~0x1FFFU);
      }
    }
  }
  for (unsigned column = 0; column < 2 * p.groups; ++column) {
    const unsigned row_of_b = column / 2 * 8 + self->lane % 4 * 2 + column % 2;
    std::array<float, 2> sums{};
    for (unsigned right = 0; right < 2; ++right) {
      const unsigned char* const vector = vector_of(p.b, row_of_b, right);
      for (unsigned i = 0; i < numbers; ++i) {
        const float y = element(p.operands, vector, i);
        for (unsigned r = 0; r < 2; ++r) {
          sums[r] += a[r][right * numbers + i] * y;
        }
      }
    }
    for (unsigned r = 0; r < 2; ++r) {
      d[column / 2 * 4 + 2 * r + column % 2] += sums[r];
    }
  }
}

// For the check of races and what is counted: a lane stands for a part of what its warp reads,
// eight lanes for a column of eight vectors.
void show_reads(const Product& p) {
  for (unsigned i = self->lane; observer != nullptr && i < 16 * p.groups; i += kWarp) {
    observer->product_read(vector_of(p.b, i / 16 * 8 + i % 8, i / 8 % 2), 16, p.from);
  }
}

void land(std::vector<Product>& products, size_t i) {
  Product& p = products[i];
  if (std::memcmp(p.registers, p.a[self->lane % 4].data(), sizeof(p.a[0])) != 0) {
    fail("wgmma: registers of A were changed before the wait for the product");
  }
  show_reads(p);
  multiply(p, p.kept.data());
  for (size_t later = i + 1; later < products.size(); ++later) {
    if (products[later].d == p.d) {
      products[later].begins = true;
      products[later].kept = p.kept;
      return;
    }
  }
  std::copy_n(p.kept.begin(), 4 * p.groups, p.d);
}

}  // namespace

uint32_t shared_address(const void* at) {
  const auto* const byte = static_cast<const unsigned char*>(at);
  if (byte < machine.dynamic_shared || byte > machine.dynamic_shared + machine.dynamic_bytes) {
    fail("an address that is not of the block's dynamic shared memory");
  }
  return shared_base() + static_cast<uint32_t>(byte - machine.dynamic_shared);
}

void wgmma(Operands operands, float* d, unsigned groups, const uint32_t* a, uint64_t b,
           Place place) {
  if (groups > kMostGroups || machine.threads.size() < (self->warp / 4 + 1) * size_t{4 * kWarp}) {
    fail("wgmma: more columns than are emulated, or fewer than four warps");
  }
  Queue& queue = queue_of(self->linear);
  if (!queue.fenced) {
    fail("wgmma without wgmma.fence after the products before");
  }
  Product product{operands, d,           groups, a,  {},
                  b,        queue.group, true,   {}, __builtin_return_address(0)};
  std::array<std::array<uint32_t, 4>, kWarp> all;
  const unsigned detail = groups * 2 + (operands == Operands::kTf32 ? 1 : 0);
  warp_gather(WarpKind::kWgmma, detail, ~0U, a, all.data(), sizeof(all[0]), place);
  std::copy_n(all.begin() + self->lane / 4 * 4, 4, product.a.begin());
  if (self->lane == 0) {
    queue.issued = (queue.issued ^ b) * 0x9E3779B97F4A7C15U + detail;
    for (unsigned i = 0; observer != nullptr && i < groups; ++i) {
      observer->matrix_product();
    }
  }
  if (config().seed % 2 == 1) {
    show_reads(product);
    multiply(product, d);
    return;
  }
  for (const Product& earlier : queue.products) {
    product.begins = product.begins && earlier.d != d;
  }
  if (product.begins) {
    std::copy_n(d, 4 * groups, product.kept.begin());
    std::fill_n(d, 4 * groups, NAN);
  }
  queue.products.push_back(product);
}

void wgmma_fence(Place place) {
  warp_gather(WarpKind::kWgmma, 1000, ~0U, nullptr, nullptr, 0, place);
  queue_of(self->linear).fenced = true;
}

void wgmma_commit(Place place) {
  warp_gather(WarpKind::kWgmma, 1001, ~0U, nullptr, nullptr, 0, place);
  Queue& queue = queue_of(self->linear);
  ++queue.group;
  queue.fenced = false;
  if (self->lane != 0) {
    return;
  }
  queue.groups.push_back(queue.issued);
  for (unsigned i = 0; i < 4; ++i) {
    const Queue& other = queue_of((self->warp / 4 * 4 + i) * kWarp);
    if (other.groups.size() >= queue.groups.size() &&
        other.groups[queue.groups.size() - 1] != queue.issued) {
      fail("wgmma: four warps that belong together issue different products");
    }
  }
}

void wgmma_wait(int pending, Place place) {
  warp_gather(WarpKind::kWgmma, 1002, ~0U, nullptr, nullptr, 0, place);
  std::vector<Product>& products = queue_of(self->linear).products;
  const int last = queue_of(self->linear).group - pending;
  size_t landed = 0;
  while (landed < products.size() && products[landed].group < last) {
    land(products, landed++);
  }
  products.erase(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(landed));
}

void show_to_products() {
  if (observer != nullptr) {
    observer->shown();
  }
}

}  // namespace simt
