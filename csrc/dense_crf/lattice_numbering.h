// SPDX-License-Identifier: Apache-2.0
// The vertices of all bands numbered together, and which rows belong to one vertex.
#pragma once

#include <utility>

#include "common/buffer.h"
#include "common/isa_namespace.h"
#include "dense_crf/lattice_keys.h"
#include "dense_crf/permutohedral_cpu.h"
#include "dense_crf/vertex_table.h"

namespace pydense::PYDENSE_ISA {

// All bands' vertices, numbered together in order of first touch.
struct Numbering {
  Buffer band_rows;  // [B + 1] int64
  Buffer vertex_of;  // [R] int32, by row
  Buffer own_row;    // [M] int32
  Buffer touches;    // [M] int32: rows of the vertex beyond its own
  int64_t shared = 0;
  int64_t shared_rows = 0;
};

template <int Words>
Numbering number_vertices(const TaskArray<VertexTable<Words>>& tables, int64_t bands,
                          VertexTable<Words>* vertices) {
  Numbering n;
  n.band_rows = buffer_of<int64_t>(static_cast<size_t>(bands) + 1);
  auto* band_rows = n.band_rows.as<int64_t>();
  band_rows[0] = 0;
  for (int64_t b = 0; b < bands; ++b) {
    band_rows[b + 1] = band_rows[b] + tables[b].size();
  }
  check_row_count(band_rows[bands]);
  const auto rows = static_cast<size_t>(band_rows[bands]);
  n.vertex_of = buffer_of<int32_t>(rows);
  n.own_row = buffer_of<int32_t>(rows);
  n.touches = buffer_of<int32_t>(rows);
  auto* own_row = n.own_row.as<int32_t>();
  auto* touches = n.touches.as<int32_t>();
  for (int64_t b = 0; b < bands; ++b) {
    const VertexTable<Words>& table = tables[b];
    constexpr int64_t kAhead = 12;  // lookups in flight: the table is larger than the caches
    for (int64_t i = 0; i < table.size(); ++i) {
      if (i + kAhead < table.size()) {
        vertices->prefetch(table.key(i + kAhead).hash());
      }
      const int64_t known = vertices->size();
      const int32_t v = vertices->find_or_insert(table.key(i), table.key(i).hash());
      const auto row = static_cast<int32_t>(band_rows[b] + i);
      n.vertex_of.as<int32_t>()[row] = v;
      if (v >= known) {
        own_row[v] = row;
        touches[v] = 0;
      } else {
        n.shared += touches[v]++ == 0 ? 1 : 0;
      }
    }
  }
  n.shared_rows = n.shared + band_rows[bands] - vertices->size();
  return n;
}

// Lists the rows of every vertex that several bands touch, its own row first, bands in order.
inline void write_shared(const Numbering& n, int64_t vertices, int64_t rows, int64_t* starts,
                         int32_t* shared_rows) {
  const auto* own_row = n.own_row.as<int32_t>();
  auto* at = n.touches.as<int32_t>();  // from here on: where the vertex's list goes on
  int64_t position = 0;
  int64_t s = 0;
  for (int64_t v = 0; v < vertices; ++v) {
    if (at[v] > 0) {
      starts[s++] = position;
      shared_rows[position] = own_row[v];
      position += 1 + std::exchange(at[v], static_cast<int32_t>(position) + 1);
    }
  }
  starts[s] = position;
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t v = n.vertex_of.as<int32_t>()[row];
    if (row != own_row[v]) {
      shared_rows[at[v]++] = static_cast<int32_t>(row);
    }
  }
}

}  // namespace pydense::PYDENSE_ISA
