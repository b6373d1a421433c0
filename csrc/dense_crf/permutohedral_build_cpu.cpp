// SPDX-License-Identifier: Apache-2.0
// Building the lattice: every band embeds its points and numbers the vertices it meets, then the
// bands' vertices are numbered together in band order and each vertex looks its neighbours up.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/simd.h"
#include "dense_crf/permutohedral.h"
#include "dense_crf/permutohedral_cpu.h"
#include "dense_crf/permutohedral_math.h"
#include "dense_crf/vertex_table.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int kLanes = kNativeLanes;
using F = FloatVec<kLanes>;
using I = IntVec<kLanes>;
constexpr int kCoordinates = kMaxLatticeDims + 1;

// Calls block(first point, points in the block, feature vectors [d]); the last block of a band
// repeats its last point.
template <class Block>
void for_each_block(const LatticeFeatures& features, int64_t begin, int64_t end,
                    const Block& block) {
  F feature[kMaxLatticeDims];
  for (int64_t p = begin; p < end; p += kLanes) {
    const auto count = static_cast<int>(std::min<int64_t>(kLanes, end - p));
    for (int i = 0; i < features.dims; ++i) {
      const float* from = features.data + i * features.dim_stride + p * features.point_stride;
      if (count == kLanes && features.point_stride == 1) {
        feature[i] = load<F>(from);
      } else {
        float lanes[kLanes];
        for (int l = 0; l < kLanes; ++l) {
          lanes[l] = from[std::min(l, count - 1) * features.point_stride];
        }
        feature[i] = load<F>(lanes);
      }
    }
    block(p, count, feature);
  }
}

void measure_band(const LatticeFeatures& features, const float* scale, int64_t begin, int64_t end,
                  LatticeBounds* bounds) {
  F low[kCoordinates];
  F high[kCoordinates];
  for (int i = 0; i <= features.dims; ++i) {
    low[i] = F{} + 3e38f;
    high[i] = F{} - 3e38f;
  }
  F poison{};
  for_each_block(features, begin, end, [&](int64_t, int, const F* feature) {
    F e[kCoordinates];
    elevate(feature, scale, features.dims, e);
    for (int i = 0; i <= features.dims; ++i) {
      low[i] = low[i] < e[i] ? low[i] : e[i];
      high[i] = high[i] > e[i] ? high[i] : e[i];
      poison = poison + (e[i] - e[i]);  // 0, or NaN once a coordinate is NaN or infinite
    }
  });
  float poisons[kLanes];
  store(poisons, poison);
  for (int i = 0; i <= features.dims; ++i) {
    float lows[kLanes];
    float highs[kLanes];
    store(lows, low[i]);
    store(highs, high[i]);
    bounds->low[i] = lows[0];
    bounds->high[i] = highs[0];
    for (int l = 1; l < kLanes; ++l) {
      bounds->low[i] = std::min(bounds->low[i], lows[l]);
      bounds->high[i] = std::max(bounds->high[i], highs[l]);
    }
    for (const float lane : poisons) {
      bounds->low[i] += lane;
    }
  }
}

// Embeds the points of a band; writes weights and entries, and numbers the vertices in `table`.
template <int Dims, int Words>
void embed_band(const LatticeFeatures& features, const float* scale, const KeyLayout& layout,
                int64_t begin, int64_t end, float* weights, int32_t* point_entries,
                VertexTable<Words>* table) {
  const int d = Dims > 0 ? Dims : features.dims;
  Key<Words> period[kMaxLatticeDims + 1];
  Key<Words> ones{};
  for (int i = 0; i < d; ++i) {
    period[i] = coordinate_key<Words>(layout, i, d + 1);
    ones = ones + coordinate_key<Words>(layout, i, 1);
  }
  period[d] = Key<Words>{};  // the last coordinate is not stored
  Key<Words> last_key[kCoordinates];
  int32_t last_id[kCoordinates];
  for (int r = 0; r <= d; ++r) {
    last_id[r] = -1;
  }
  for_each_block(features, begin, end, [&](int64_t p, int count, const F* feature) {
    F e[kCoordinates];
    F work[kCoordinates];
    F weight[kCoordinates];
    I base[kCoordinates];
    I rank[kCoordinates];
    elevate(feature, scale, d, e);
    enclosing_simplex(e, d, base, rank, weight, work);
    alignas(64) int32_t bases[kCoordinates][kLanes];
    alignas(64) int32_t ranks[kCoordinates][kLanes];
    alignas(64) float weight_lanes[kCoordinates][kLanes];
    for (int i = 0; i <= d; ++i) {
      store(bases[i], base[i]);
      store(ranks[i], rank[i]);
      store(weight_lanes[i], weight[i]);
    }
    for (int l = 0; l < count; ++l) {
      Key<Words> key{};
      Key<Words> by_rank[kCoordinates];
      for (int i = 0; i < d; ++i) {
        key = key + coordinate_key<Words>(layout, i, bases[i][l] - layout.minimum[i]);
        by_rank[ranks[i][l]] = period[i];
      }
      by_rank[ranks[d][l]] = period[d];
      int32_t* const entry = point_entries + (p + l) * (d + 1);
      float* const to = weights + (p + l) * (d + 1);
      for (int r = 0; r <= d; ++r) {
        if (r > 0) {
          key = key + ones - by_rank[d + 1 - r];
        }
        // Neighbouring points mostly share their vertices.
        if (last_id[r] < 0 || !(key == last_key[r])) {
          last_key[r] = key;
          last_id[r] = table->find_or_insert(key, key.hash());
        }
        entry[r] = last_id[r];
        to[r] = weight_lanes[r][l];
      }
    }
  });
}

template <class T>
T* fill_buffer(Buffer* buffer, int64_t count) {
  *buffer = buffer_of<T>(static_cast<size_t>(count));
  return buffer->as<T>();
}

// Numbers the vertices of all bands together, in band order, and gives every entry its row.
template <int Words>
void number_vertices(const TaskArray<VertexTable<Words>>& tables, VertexTable<Words>* vertices,
                     Lattice* lattice) {
  LatticeView& view = lattice->view;
  auto* entries = fill_buffer<LatticeEntry>(&lattice->entries, view.num_entries);
  auto* band_vertices = fill_buffer<int64_t>(&lattice->band_vertices, view.num_bands + 1);
  view.entries = entries;
  view.band_vertices = band_vertices;
  int64_t shared = 0;  // extra rows so far, counted behind the vertices until these are known
  for (int64_t b = 0; b < view.num_bands; ++b) {
    const VertexTable<Words>& table = tables[b];
    band_vertices[b] = vertices->size();
    constexpr int64_t kAhead = 12;  // lookups in flight: the table is larger than the caches
    for (int64_t i = 0; i < table.size(); ++i) {
      if (i + kAhead < table.size()) {
        vertices->prefetch(table.key(i + kAhead).hash());
      }
      const int64_t known = vertices->size();
      const int32_t v = vertices->find_or_insert(table.key(i), table.key(i).hash());
      const bool first = v >= known;
      entries[view.band_entries[b] + i] = {first ? v : static_cast<int32_t>(~shared), v};
      shared += first ? 0 : 1;
    }
  }
  view.num_vertices = vertices->size();
  band_vertices[view.num_bands] = view.num_vertices;

  // Counting sort of the extra rows by vertex; bands stay in order.
  const int64_t m = view.num_vertices;
  Buffer counts = buffer_of<int32_t>(static_cast<size_t>(m));
  std::memset(counts.data(), 0, counts.bytes());
  for (int64_t e = 0; e < view.num_entries; ++e) {
    if (entries[e].row < 0) {
      entries[e].row = static_cast<int32_t>(m + ~entries[e].row);
      ++counts.as<int32_t>()[entries[e].vertex];
    }
  }
  for (int64_t v = 0; v < m; ++v) {
    view.num_shared += counts.as<int32_t>()[v] > 0 ? 1 : 0;
  }
  auto* shared_vertices = fill_buffer<int32_t>(&lattice->shared_vertices, view.num_shared);
  auto* starts = fill_buffer<int64_t>(&lattice->shared_starts, view.num_shared + 1);
  auto* shared_rows = fill_buffer<int32_t>(&lattice->shared_rows, shared);
  int32_t position = 0;
  int64_t s = 0;
  for (int64_t v = 0; v < m; ++v) {
    int32_t& count = counts.as<int32_t>()[v];
    if (count > 0) {
      shared_vertices[s] = static_cast<int32_t>(v);
      starts[s++] = position;
      position += std::exchange(count, position);  // from here on: where the vertex goes on
    }
  }
  starts[s] = position;
  for (int64_t e = 0; e < view.num_entries; ++e) {
    if (entries[e].row >= m) {
      shared_rows[counts.as<int32_t>()[entries[e].vertex]++] = entries[e].row;
    }
  }
  view.shared_vertices = shared_vertices;
  view.shared_starts = starts;
  view.shared_rows = shared_rows;
}

// Orders the vertices along every axis so that neighbours follow each other.
template <int Words>
void link_chains(const VertexTable<Words>& table, const KeyLayout& layout, Lattice* lattice,
                 ParallelFor parallel_for) {
  LatticeView& view = lattice->view;
  const int d = view.dims;
  const int64_t m = view.num_vertices;
  const int64_t chunks = ceil_div(m, kVertexChunk);
  const Buffer following = buffer_of<int32_t>(static_cast<size_t>((d + 1) * m));
  const Buffer followed = buffer_of<uint8_t>(static_cast<size_t>((d + 1) * m));
  std::memset(followed.data(), 0, followed.bytes());
  Key<Words> ones{};
  for (int i = 0; i < d; ++i) {
    ones = ones + coordinate_key<Words>(layout, i, 1);
  }
  parallel_tasks(parallel_for, (d + 1) * chunks, [&](int64_t task) {
    const int64_t j = task / chunks;
    int32_t* next = following.as<int32_t>() + j * m;
    uint8_t* has_previous = followed.as<uint8_t>() + j * m;
    const Key<Words> step =
        j < d ? ones - coordinate_key<Words>(layout, static_cast<int>(j), d + 1) : ones;
    constexpr int kAhead = 16;
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
  int64_t lengths[kCoordinates];
  parallel_tasks(parallel_for, d + 1, [&](int64_t j) {
    const int32_t* next = following.as<int32_t>() + j * m;
    const uint8_t* has_previous = followed.as<uint8_t>() + j * m;
    lengths[j] = 0;
    for (int64_t v = 0; v < m; ++v) {
      lengths[j] += next[v] >= 0 || has_previous[v] != 0 ? 1 : 0;
    }
  });
  view.chain_starts[0] = 0;
  for (int j = 0; j <= d; ++j) {
    view.chain_starts[j + 1] = view.chain_starts[j] + lengths[j];
  }
  auto* chains = fill_buffer<int32_t>(&lattice->chains, view.chain_starts[d + 1]);
  view.chains = chains;
  parallel_tasks(parallel_for, d + 1, [&](int64_t j) {
    const int32_t* next = following.as<int32_t>() + j * m;
    const uint8_t* has_previous = followed.as<uint8_t>() + j * m;
    int32_t* chain = chains + view.chain_starts[j];
    for (int64_t first = 0; first < m; ++first) {
      if (has_previous[first] == 0 && next[first] >= 0) {
        auto v = static_cast<int32_t>(first);
        for (; next[v] >= 0; v = next[v]) {
          *chain++ = v;
        }
        *chain++ = ~v;
      }
    }
  });
}

template <int Dims, int Words>
Lattice build_with(const LatticeFeatures& features, const float* scale, const KeyLayout& layout,
                   ParallelFor parallel_for) {
  const int64_t n = features.num_points;
  const int64_t bands = lattice_bands(n);
  Lattice lattice;
  LatticeView& view = lattice.view;
  view.dims = features.dims;
  view.alpha = lattice_alpha(features.dims);
  view.num_points = n;
  view.num_bands = bands;
  const int corners = features.dims + 1;
  auto* weights = fill_buffer<float>(&lattice.weights, n * corners);
  auto* point_entries = fill_buffer<int32_t>(&lattice.point_entries, n * corners);
  view.weights = weights;
  view.point_entries = point_entries;

  TaskArray<VertexTable<Words>> tables(bands);
  parallel_tasks(parallel_for, bands, [&](int64_t b) {
    VertexTable<Words>* table = tables.emplace(b, int64_t{512});
    embed_band<Dims, Words>(features, scale, layout, band_begin(n, bands, b),
                            band_begin(n, bands, b + 1), weights, point_entries, table);
  });

  auto* band_entries = fill_buffer<int64_t>(&lattice.band_entries, bands + 1);
  band_entries[0] = 0;
  for (int64_t b = 0; b < bands; ++b) {
    band_entries[b + 1] = band_entries[b] + tables[b].size();
  }
  view.band_entries = band_entries;
  view.num_entries = band_entries[bands];
  check_entry_count(view.num_entries);
  VertexTable<Words> vertices(view.num_entries / 2);
  number_vertices(tables, &vertices, &lattice);
  link_chains(vertices, layout, &lattice, parallel_for);
  return lattice;
}

}  // namespace

Lattice build_lattice_cpu(const LatticeFeatures& features, ParallelFor parallel_for) {
  float scale[kMaxLatticeDims];
  lattice_scale(features.dims, scale);
  const int64_t bands = lattice_bands(features.num_points);
  const Buffer bounds = buffer_of<LatticeBounds>(static_cast<size_t>(bands));
  parallel_tasks(parallel_for, bands, [&](int64_t b) {
    measure_band(features, scale, band_begin(features.num_points, bands, b),
                 band_begin(features.num_points, bands, b + 1), bounds.as<LatticeBounds>() + b);
  });
  const KeyLayout layout = plan_keys(bounds.as<LatticeBounds>(), bands, features.dims);
  if (layout.words == 1) {
    switch (features.dims) {
      case 2:
        return build_with<2, 1>(features, scale, layout, parallel_for);
      case 3:
        return build_with<3, 1>(features, scale, layout, parallel_for);
      case 5:
        return build_with<5, 1>(features, scale, layout, parallel_for);
      default:
        return build_with<0, 1>(features, scale, layout, parallel_for);
    }
  }
  if (layout.words == 2) {
    return build_with<0, 2>(features, scale, layout, parallel_for);
  }
  if (layout.words <= 4) {
    return build_with<0, 4>(features, scale, layout, parallel_for);
  }
  return build_with<0, 16>(features, scale, layout, parallel_for);
}

}  // namespace pydense::PYDENSE_ISA
