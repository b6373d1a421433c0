// SPDX-License-Identifier: Apache-2.0
// Who lies next to whom in a lattice: the next vertex along every axis, the chains that blurring
// walks, and the part of a point's own value that comes back to it.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/buffer.h"
#include "common/hd.h"
#include "common/isa_namespace.h"
#include "common/parallel.h"
#include "dense_crf/lattice_keys.h"
#include "dense_crf/permutohedral_cpu.h"
#include "dense_crf/vertex_table.h"

namespace pydense::PYDENSE_ISA {

struct LatticeLinks {
  int64_t vertices;
  int dims;
  Buffer next;      // [d + 1, vertices] int32: the vertex one step along an axis, or -1
  Buffer previous;  // [d + 1, vertices] uint8: whether there is one a step back

  const int32_t* next_along(int64_t axis) const { return next.as<int32_t>() + axis * vertices; }
  uint8_t* has_previous(int64_t axis) const { return previous.as<uint8_t>() + axis * vertices; }
};

template <int Words>
LatticeLinks link_vertices(const VertexTable<Words>& table, const KeyLayout& layout, int dims,
                           ParallelFor parallel_for) {
  const int64_t m = table.size();
  const auto slots = static_cast<size_t>((dims + 1) * m);
  LatticeLinks links{m, dims, buffer_of<int32_t>(slots), buffer_of<uint8_t>(slots)};
  std::memset(links.previous.data(), 0, links.previous.bytes());
  const int64_t chunks = ceil_div(m, kVertexChunk);
  Key<Words> ones{};
  for (int i = 0; i < dims; ++i) {
    ones = ones + coordinate_key<Words>(layout, i, 1);
  }
  parallel_tasks(parallel_for, (dims + 1) * chunks, [&](int64_t task) {
    const int64_t j = task / chunks;
    int32_t* next = links.next.as<int32_t>() + j * m;
    uint8_t* has_previous = links.has_previous(j);
    const Key<Words> step =
        j < dims ? ones - coordinate_key<Words>(layout, static_cast<int>(j), dims + 1) : ones;
    constexpr int kAhead = 64;
    Key<Words> keys[kAhead];
    uint64_t hashes[kAhead];
    const int64_t begin = task % chunks * kVertexChunk;
    const int64_t end = std::min(begin + kVertexChunk, m);
    for (int64_t v = begin; v < end; v += kAhead) {
      const auto count = static_cast<int>(std::min<int64_t>(kAhead, end - v));
      for (int q = 0; q < count; ++q) {
        keys[q] = table.key(v + q) + step;
        hashes[q] = keys[q].hash();
        table.prefetch(hashes[q]);
      }
      for (int q = 0; q < count; ++q) {
        const int32_t found = table.find(keys[q], hashes[q]);
        next[v + q] = found;
        if (found >= 0) {
          has_previous[found] = 1;  // by one vertex at most
        }
      }
    }
  });
  return links;
}

// starts[j] .. starts[j + 1]: the vertices that have a neighbour along axis j.
inline void measure_chains(const LatticeLinks& links, int64_t* starts, ParallelFor parallel_for) {
  starts[0] = 0;
  parallel_tasks(parallel_for, links.dims + 1, [&](int64_t j) {
    const int32_t* next = links.next_along(j);
    const uint8_t* has_previous = links.has_previous(j);
    int64_t length = 0;
    for (int64_t v = 0; v < links.vertices; ++v) {
      length += next[v] >= 0 || has_previous[v] != 0 ? 1 : 0;
    }
    starts[j + 1] = length;
  });
  for (int j = 0; j <= links.dims; ++j) {
    starts[j + 1] += starts[j];
  }
}

// Writes the rows of neighbours next to each other, the last of a chain as ~row; chains of less
// than kLongChain rows by length, and in order of their first vertices.
inline void write_chains(const LatticeLinks& links, const int32_t* row_of, const int64_t* starts,
                         int32_t* chains, ParallelFor parallel_for) {
  parallel_tasks(parallel_for, links.dims + 1, [&](int64_t j) {
    const int32_t* next = links.next_along(j);
    const uint8_t* has_previous = links.has_previous(j);
    const int64_t total = starts[j + 1] - starts[j];
    const Buffer by_vertex = buffer_of<int32_t>(static_cast<size_t>(total));
    int32_t* chain = by_vertex.as<int32_t>();
    int64_t place[kLongChain + 2] = {};  // first rows used, then where chains of a length go to
    for (int64_t first = 0; first < links.vertices; ++first) {
      if (has_previous[first] == 0 && next[first] >= 0) {
        int32_t* const begin = chain;
        auto v = static_cast<int32_t>(first);
        for (; next[v] >= 0; v = next[v]) {
          *chain++ = row_of[v];
        }
        *chain++ = ~row_of[v];
        place[std::min<int64_t>(chain - begin, kLongChain) + 1] += chain - begin;
      }
    }
    for (int length = 1; length <= kLongChain; ++length) {
      place[length] += place[length - 1];
    }
    const auto* from = by_vertex.as<int32_t>();
    for (int64_t i = 0; i < total;) {
      int64_t length = 1;
      while (from[i + length - 1] >= 0) {
        ++length;
      }
      int64_t& to = place[std::min<int64_t>(length, kLongChain)];
      std::memcpy(chains + starts[j] + to, from + i, static_cast<size_t>(length) * sizeof(int32_t));
      to += length;
      i += length;
    }
  });
  std::fill_n(chains + starts[links.dims + 1], kChainPadding, 0);
}

// The diagonal of slice * blur * splat, simplex by simplex. Blurring takes a value from a corner r
// of a simplex to a corner s along the axes that lie between them, forwards, or along all others,
// backwards, in the order of the axes and through vertices that exist; half of it is left at every
// step.
class SelfWeight {
 public:
  explicit SelfWeight(const LatticeLinks& links)
      : links_(links), back_(buffer_of<int32_t>(links.next.bytes() / sizeof(int32_t))) {
    std::memset(back_.data(), 0xFF, back_.bytes());
    for (int64_t j = 0; j <= links.dims; ++j) {
      const int32_t* next = links.next_along(j);
      int32_t* back = back_.as<int32_t>() + j * links.vertices;
      for (int64_t v = 0; v < links.vertices; ++v) {
        if (next[v] >= 0) {
          back[next[v]] = static_cast<int32_t>(v);
        }
      }
    }
  }

  // shares[s * (d + 1) + r]: how much of corner r's value reaches corner s.
  template <class T>
  void simplex(const int32_t* corners /* vertices [d + 1] */, T* shares) const {
    const int n = links_.dims + 1;
    int axis_after[kMaxLatticeDims + 1];  // the step from corner r to the next one
    for (int r = 0; r < n; ++r) {
      const int32_t to = corners[(r + 1) % n];
      axis_after[r] = 0;
      while (links_.next_along(axis_after[r])[corners[r]] != to) {
        ++axis_after[r];
      }
    }
    for (int r = 0; r < n; ++r) {
      bool forwards[kMaxLatticeDims + 1] = {};
      int steps = 0;
      for (int s = r;; s = (s + 1) % n) {
        T share = walk<T>(corners[r], forwards, steps, true);
        share += walk<T>(corners[r], forwards, n - steps, false);
        if (steps == 0) {  // also once around, forwards
          bool all[kMaxLatticeDims + 1];
          std::fill(all, all + n, true);
          share += walk<T>(corners[r], all, n, true);
        }
        shares[s * n + r] = share;
        forwards[axis_after[s]] = true;
        if (++steps == n) {
          break;
        }
      }
    }
  }

 private:
  template <class T>
  T walk(int32_t v, const bool* forwards, int steps, bool forward) const {
    const int32_t* table = forward ? links_.next.as<int32_t>() : back_.as<int32_t>();
    for (int64_t j = 0; j <= links_.dims && v >= 0; ++j) {
      if (forwards[j] == forward) {
        v = table[j * links_.vertices + v];
      }
    }
    return v < 0 ? T{0} : T{1} / static_cast<T>(int64_t{1} << steps);
  }

  const LatticeLinks& links_;
  Buffer back_;  // [d + 1, vertices]
};

}  // namespace pydense::PYDENSE_ISA
