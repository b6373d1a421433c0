// SPDX-License-Identifier: Apache-2.0
// Building the lattice: every band embeds its points and numbers the vertices it meets, then the
// bands' vertices are numbered together in band order and each vertex looks its neighbours up.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/simd.h"
#include "dense_crf/lattice_bytes.h"
#include "dense_crf/lattice_links.h"
#include "dense_crf/lattice_numbering.h"
#include "dense_crf/lattice_rows.h"
#include "dense_crf/permutohedral.h"
#include "dense_crf/permutohedral_cpu.h"
#include "dense_crf/permutohedral_math.h"
#include "dense_crf/vertex_table.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int kCoordinates = kMaxLatticeDims + 1;

template <class T>
struct Lanes {
  static constexpr int kCount = kNativeLanesOf<T>;
  using F = Vec<T, kCount>;
  using I = Vec<IntOf<T>, kCount>;
};

// Calls block(first point, points in the block, feature vectors [d]); a short block repeats its
// last point.
template <class T, class Block>
void for_each_block(const LatticeFeatures<T>& features, const Band& band, const Block& block) {
  constexpr int kLanes = Lanes<T>::kCount;
  using F = typename Lanes<T>::F;
  F feature[kMaxLatticeDims];
  for_each_run(band, kLanes, [&](const Run& run) {
    const int count = run.count;
    for (int i = 0; i < features.dims; ++i) {
      const T* from = features.data + i * features.dim_stride + run.pixel * features.point_stride;
      if (count == kLanes && features.point_stride == 1) {
        feature[i] = load<F>(from);
      } else {
        T lanes[kLanes];
        for (int l = 0; l < kLanes; ++l) {
          lanes[l] = from[std::min(l, count - 1) * features.point_stride];
        }
        feature[i] = load<F>(lanes);
      }
    }
    block(run.point, count, feature);
  });
}

template <class T, int Dims>
void measure_band(const LatticeFeatures<T>& features, const T* scale, const Band& band,
                  LatticeBounds* bounds) {
  constexpr int kLanes = Lanes<T>::kCount;
  using F = typename Lanes<T>::F;
  const int d = Dims > 0 ? Dims : features.dims;
  F low[kCoordinates];
  F high[kCoordinates];
  for (int i = 0; i <= d; ++i) {
    low[i] = F{} + static_cast<T>(3e38);
    high[i] = F{} - static_cast<T>(3e38);
  }
  F poison{};
  for_each_block(features, band, [&](int64_t, int, const F* feature) {
    F e[kCoordinates];
    elevate(feature, scale, d, e);
    for (int i = 0; i <= d; ++i) {
      low[i] = low[i] < e[i] ? low[i] : e[i];
      high[i] = high[i] > e[i] ? high[i] : e[i];
      poison = poison + (e[i] - e[i]);  // 0, or NaN once a coordinate is NaN or infinite
    }
  });
  T poisons[kLanes];
  store(poisons, poison);
  for (int i = 0; i <= d; ++i) {
    T lows[kLanes];
    T highs[kLanes];
    store(lows, low[i]);
    store(highs, high[i]);
    bounds->low[i] = static_cast<double>(lows[0]);
    bounds->high[i] = static_cast<double>(highs[0]);
    for (int l = 1; l < kLanes; ++l) {
      bounds->low[i] = std::min(bounds->low[i], static_cast<double>(lows[l]));
      bounds->high[i] = std::max(bounds->high[i], static_cast<double>(highs[l]));
    }
    for (const T lane : poisons) {
      bounds->low[i] += static_cast<double>(lane);
    }
  }
}

// Embeds the points of a band; writes weights and ids, and numbers the vertices in `table`.
template <class T, int Dims, int Words>
void embed_band(const LatticeFeatures<T>& features, const T* scale, const KeyLayout& layout,
                const Band& band, T* weights, int32_t* ids, VertexTable<Words>* table) {
  constexpr int kLanes = Lanes<T>::kCount;
  using F = typename Lanes<T>::F;
  using I = typename Lanes<T>::I;
  using Words64 = Vec<uint64_t, kLanes>;
  const int d = Dims > 0 ? Dims : features.dims;
  uint64_t ones[Words] = {};
  for (int i = 0; i < d; ++i) {
    ones[word_of<Words>(layout, i)] += uint64_t{1} << layout.shift[i];
  }
  for_each_block(features, band, [&](int64_t p, int count, const F* feature) {
    F e[kCoordinates];
    F work[kCoordinates];
    F weight[kCoordinates];
    I base[kCoordinates];
    I rank[kCoordinates];
    elevate(feature, scale, d, e);
    enclosing_simplex<T>(e, d, base, rank, weight, work);
    Words64 key[Words] = {};
    for (int i = 0; i < d; ++i) {
      const I place = base[i] - layout.minimum[i];
      key[word_of<Words>(layout, i)] += __builtin_convertvector(place, Words64)
                                        << static_cast<uint64_t>(layout.shift[i]);
    }
    alignas(64) Key<Words> keys[kCoordinates][kLanes];
    alignas(64) T weight_lanes[kCoordinates][kLanes];
    for (int r = 0; r <= d; ++r) {
      if (r > 0) {
        // One step along the axis of the next rank: + 1 everywhere, - (d + 1) there.
        for (int w = 0; w < Words; ++w) {
          key[w] += ones[w];
        }
        for (int i = 0; i < d; ++i) {
          const auto period = static_cast<uint64_t>(d + 1) << layout.shift[i];
          const I there = rank[i] == d + 1 - r ? I{} - 1 : I{};
          key[word_of<Words>(layout, i)] -= __builtin_convertvector(there, Words64) & period;
        }
      }
      store(weight_lanes[r], weight[r]);
      for (int w = 0; w < Words; ++w) {
        alignas(64) uint64_t lanes[kLanes];
        store(lanes, key[w]);
        for (int l = 0; l < kLanes; ++l) {
          keys[r][l].word[w] = lanes[l];
        }
      }
    }
    for (int l = 0; l < count; ++l) {
      int32_t* const id = ids + (p + l) * (d + 1);
      T* const to = weights + (p + l) * (d + 1);
      for (int r = 0; r <= d; ++r) {
        id[r] = table->find_or_insert(keys[r][l], keys[r][l].hash());
        to[r] = weight_lanes[r][l];
      }
    }
  });
}

// The diagonal of the filter, without `scale` and normalisation, for every point.
template <class T, int Words>
void self_weights(const LatticeView<T>& view, const Numbering& n, const LatticeLinks& links,
                  const int32_t* ids, T* self, ParallelFor parallel_for) {
  const SelfWeight weight(links);
  const int corners = view.dims + 1;
  const BandGrid bands(view.grid);
  parallel_tasks(parallel_for, bands.count(), [&](int64_t b) {
    const int32_t* vertex_of = n.vertex_of.as<int32_t>() + view.band_rows[b];
    const Buffer buffer = buffer_of<T>(static_cast<size_t>(corners) * static_cast<size_t>(corners));
    T* shares = buffer.as<T>();
    const int32_t* last = nullptr;
    const Band band = bands.at(b);
    for (int64_t p = band.begin; p < band.end(); ++p) {
      const int32_t* id = ids + p * corners;
      if (last == nullptr || !std::equal(id, id + corners, last)) {
        int32_t vertices[kCoordinates];
        for (int r = 0; r < corners; ++r) {
          vertices[r] = vertex_of[id[r]];
        }
        weight.simplex(vertices, shares);
        last = id;
      }
      const T* w = view.weights + p * corners;
      T sum{};
      for (int s = 0; s < corners; ++s) {
        for (int r = 0; r < corners; ++r) {
          sum += w[s] * w[r] * shares[s * corners + r];
        }
      }
      self[p] = sum;
    }
  });
}

// From mass = K 1 (and the diagonal) to the factors that normalise the filter, for points
// [begin, end).
template <class T>
void normalize(const LatticeOptions& options, int64_t begin, int64_t end, T alpha, const T* mass,
               T* norm, T* self) {
  const bool symmetric = options.normalization == Normalization::kSymmetric;
  for (int64_t p = begin; p < end && norm != nullptr; ++p) {
    norm[p] = normalizing_factor(mass[p], self == nullptr ? nullptr : self + p, alpha);
  }
  for (int64_t p = begin; p < end && self != nullptr; ++p) {
    self[p] *= norm == nullptr ? alpha : norm[p];
  }
  for (int64_t p = begin; p < end && norm != nullptr && symmetric; ++p) {
    norm[p] = std::sqrt(norm[p]);
  }
}

template <class T, int Dims, int Words>
void build_with(const LatticeFeatures<T>& features, const LatticeOptions& options, const T* scale,
                const KeyLayout& layout, const ByteSink& sink, ParallelFor parallel_for) {
  const int64_t n = features.grid.points();
  const BandGrid grid(features.grid);
  const int64_t bands = grid.count();
  const int d = features.dims;
  const int corners = d + 1;
  const Buffer weights = buffer_of<T>(checked_bytes(static_cast<size_t>(n), size_t(corners)));
  const Buffer ids = buffer_of<int32_t>(checked_bytes(static_cast<size_t>(n), size_t(corners)));
  VertexTable<Words> vertices(0);
  Numbering numbering;
  {
    TaskArray<VertexTable<Words>> tables(bands);
    parallel_tasks(parallel_for, bands, [&](int64_t b) {
      VertexTable<Words>* table = tables.emplace(b, int64_t{512});
      embed_band<T, Dims, Words>(features, scale, layout, grid.at(b), weights.as<T>(),
                                 ids.as<int32_t>(), table);
      table->drop_slots();
    });
    int64_t rows = 0;
    for (int64_t b = 0; b < bands; ++b) {
      rows += tables[b].size();
    }
    vertices = VertexTable<Words>(rows / 2);
    numbering = number_vertices(tables, bands, &vertices);
  }
  const LatticeLinks links = link_vertices(vertices, layout, d, parallel_for);

  LatticeCounts counts{};
  counts.grid = features.grid;
  counts.vertices = vertices.size();
  counts.rows = numbering.band_rows.as<int64_t>()[bands];
  counts.bands = bands;
  counts.shared = numbering.shared;
  counts.shared_rows = numbering.shared_rows;
  counts.dims = d;
  const bool before = options.normalization == Normalization::kBefore ||
                      options.normalization == Normalization::kSymmetric;
  const bool after = options.normalization == Normalization::kAfter ||
                     options.normalization == Normalization::kSymmetric;
  counts.splat_norm = before;
  counts.slice_norm = after;
  counts.self = !options.self_term;
  measure_chains(links, counts.chain_starts, parallel_for);
  const T alpha = lattice_alpha<T>(d);
  void* bytes = sink.allocate(sink.context, lattice_bytes(counts, sizeof(T)));
  const LatticeView<T> view = begin_lattice(counts, before || after ? T{1} : alpha, bytes);

  std::memcpy(const_cast<int64_t*>(view.band_rows), numbering.band_rows.data(),
              numbering.band_rows.bytes());
  write_shared(numbering, counts.vertices, counts.rows, const_cast<int64_t*>(view.shared_starts),
               const_cast<int32_t*>(view.shared_rows));
  write_chains(links, numbering.own_row.as<int32_t>(), view.chain_starts,
               const_cast<int32_t*>(view.chains), parallel_for);
  void* const point_ids = const_cast<void*>(view.ids);
  parallel_tasks(parallel_for, bands, [&](int64_t b) {
    const Band band = grid.at(b);
    const int64_t begin = band.begin * corners;
    const int64_t end = band.end() * corners;
    std::memcpy(const_cast<T*>(view.weights) + begin, weights.as<T>() + begin,
                static_cast<size_t>(end - begin) * sizeof(T));
    for (int64_t i = begin; i < end; ++i) {
      const int32_t id = ids.as<int32_t>()[i];
      if (has_short_ids(d)) {
        static_cast<uint16_t*>(point_ids)[i] = static_cast<uint16_t>(id);
      } else {
        static_cast<int32_t*>(point_ids)[i] = id;
      }
    }
  });
  T* self = const_cast<T*>(view.self);
  if (self != nullptr) {
    self_weights<T, Words>(view, numbering, links, ids.as<int32_t>(), self, parallel_for);
  }
  T* norm = const_cast<T*>(before ? view.splat_norm : view.slice_norm);
  const Buffer mass = buffer_of<T>(static_cast<size_t>(norm == nullptr ? 0 : n));
  if (norm != nullptr) {
    lattice_mass(view, mass.as<T>(), parallel_for);
  }
  parallel_tasks(parallel_for, bands, [&](int64_t b) {
    normalize(options, grid.at(b).begin, grid.at(b).end(), alpha, mass.as<T>(), norm, self);
  });
}

// Calls fn(IntConstant<dims>{}) for the usual kernels, which have code of their own where their
// keys fit one word; with 0 for others.
template <class Fn>
void with_usual_dims(int dims, const Fn& fn) {
  with_corners(dims, [&](auto corners) {
    constexpr int kCorners = decltype(corners)::value;
    fn(IntConstant<(kCorners > 0 ? kCorners - 1 : 0)>{});
  });
}

template <class T>
void build(const LatticeFeatures<T>& features, const LatticeOptions& options, const ByteSink& sink,
           ParallelFor parallel_for) {
  T scale[kMaxLatticeDims];
  lattice_scale(features.dims, scale);
  const BandGrid bands(features.grid);
  const Buffer bounds = buffer_of<LatticeBounds>(static_cast<size_t>(bands.count()));
  const auto measure_as = [&](auto dims) {
    parallel_tasks(parallel_for, bands.count(), [&](int64_t b) {
      measure_band<T, decltype(dims)::value>(features, scale, bands.at(b),
                                             bounds.as<LatticeBounds>() + b);
    });
  };
  with_usual_dims(features.dims, measure_as);
  const KeyLayout layout = plan_keys(bounds.as<LatticeBounds>(), bands.count(), features.dims);
  const auto build_as = [&](auto dims, auto words) {
    build_with<T, decltype(dims)::value, decltype(words)::value>(features, options, scale, layout,
                                                                 sink, parallel_for);
  };
  if (layout.words == 1) {
    with_usual_dims(features.dims, [&](auto dims) { build_as(dims, IntConstant<1>{}); });
  } else if (layout.words == 2) {
    build_as(IntConstant<0>{}, IntConstant<2>{});
  } else if (layout.words <= 4) {
    build_as(IntConstant<0>{}, IntConstant<4>{});
  } else {
    build_as(IntConstant<0>{}, IntConstant<16>{});
  }
}

}  // namespace

void build_lattice_cpu(const LatticeFeatures<float>& features, const LatticeOptions& options,
                       const ByteSink& sink, ParallelFor parallel_for) {
  build(features, options, sink, parallel_for);
}
void build_lattice_cpu(const LatticeFeatures<double>& features, const LatticeOptions& options,
                       const ByteSink& sink, ParallelFor parallel_for) {
  build(features, options, sink, parallel_for);
}

}  // namespace pydense::PYDENSE_ISA
