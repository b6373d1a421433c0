// SPDX-License-Identifier: Apache-2.0
// Packed lattice keys and the hash table that numbers them in order of first appearance.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/buffer.h"
#include "common/hd.h"
#include "common/isa_namespace.h"
#include "dense_crf/lattice_keys.h"

namespace pydense::PYDENSE_ISA {

template <int Words>
struct Key {
  uint64_t word[Words];

  PYDENSE_HD bool operator==(const Key& other) const {
    uint64_t difference = 0;
    for (int w = 0; w < Words; ++w) {
      difference |= word[w] ^ other.word[w];
    }
    return difference == 0;
  }
  PYDENSE_HD Key operator+(const Key& other) const {
    Key sum;
    for (int w = 0; w < Words; ++w) {
      sum.word[w] = word[w] + other.word[w];
    }
    return sum;
  }
  PYDENSE_HD Key operator-(const Key& other) const {
    Key difference;
    for (int w = 0; w < Words; ++w) {
      difference.word[w] = word[w] - other.word[w];
    }
    return difference;
  }
  PYDENSE_HD uint64_t hash() const {
    uint64_t h = word[0] * 0x9E3779B97F4A7C15U;
    for (int w = 1; w < Words; ++w) {
      h = ((h ^ (h >> 31)) + word[w]) * 0x9E3779B97F4A7C15U;
    }
    return h;
  }
};

// The word of a key that coordinate i lies in.
template <int Words>
PYDENSE_HD int word_of(const KeyLayout& layout, int i) {
  return Words == 1 ? 0 : layout.word[i];
}

// A key with `value` in coordinate i and 0 elsewhere.
template <int Words>
PYDENSE_HD Key<Words> coordinate_key(const KeyLayout& layout, int i, int64_t value) {
  Key<Words> key{};
  key.word[word_of<Words>(layout, i)] = static_cast<uint64_t>(value) << layout.shift[i];
  return key;
}

template <int Words>
class VertexTable {
 public:
  explicit VertexTable(int64_t expected) {
    int log2 = 8;
    while ((int64_t{1} << log2) < 2 * expected) {
      ++log2;
    }
    allocate_slots(log2);
  }

  int64_t size() const { return size_; }
  const Key<Words>& key(int64_t id) const { return keys_.template as<Key<Words>>()[id]; }

  PYDENSE_HD void prefetch(uint64_t hash) const { __builtin_prefetch(&slots()[hash >> shift_]); }

  PYDENSE_HD int32_t find_or_insert(const Key<Words>& key, uint64_t hash) {
    int64_t i = static_cast<int64_t>(hash >> shift_);
    for (; slots()[i].id >= 0; i = (i + 1) & mask_) {
      if (slots()[i].key == key) {
        return slots()[i].id;
      }
    }
    return insert(key, hash, i);
  }

  // -1 where the key is not in the table.
  PYDENSE_HD int32_t find(const Key<Words>& key, uint64_t hash) const {
    int64_t i = static_cast<int64_t>(hash >> shift_);
    for (; slots()[i].id >= 0; i = (i + 1) & mask_) {
      if (slots()[i].key == key) {
        return slots()[i].id;
      }
    }
    return -1;
  }

  // Keeps the keys alone: nothing can be looked up any more.
  void drop_slots() { slots_ = Buffer(); }

 private:
  struct Slot {
    Key<Words> key;
    int32_t id;
  };

  PYDENSE_HD Slot* slots() const { return slots_.template as<Slot>(); }

  void allocate_slots(int log2) {
    const size_t capacity = size_t{1} << log2;
    slots_ = buffer_of<Slot>(capacity);
    std::memset(slots_.data(), 0xFF, slots_.bytes());  // id -1: empty
    keys_.grow(checked_bytes(capacity / 2, sizeof(Key<Words>)),
               static_cast<size_t>(size_) * sizeof(Key<Words>));
    mask_ = static_cast<int64_t>(capacity) - 1;
    shift_ = 64 - log2;
  }

  __attribute__((noinline)) int32_t insert(const Key<Words>& key, uint64_t hash, int64_t i) {
    if (2 * (size_ + 1) > mask_ + 1) {
      allocate_slots(64 - shift_ + 1);
      for (int64_t id = 0; id < size_; ++id) {
        slots()[free_slot(this->key(id).hash())] = {this->key(id), static_cast<int32_t>(id)};
      }
      i = free_slot(hash);
    }
    slots()[i] = {key, static_cast<int32_t>(size_)};
    keys_.template as<Key<Words>>()[size_] = key;
    return static_cast<int32_t>(size_++);
  }

  int64_t free_slot(uint64_t hash) const {
    int64_t i = static_cast<int64_t>(hash >> shift_);
    while (slots()[i].id >= 0) {
      i = (i + 1) & mask_;
    }
    return i;
  }

  Buffer slots_;
  Buffer keys_;
  int64_t size_ = 0;
  int64_t mask_ = 0;
  int shift_ = 64;
};

}  // namespace pydense::PYDENSE_ISA
