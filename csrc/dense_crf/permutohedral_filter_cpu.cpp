// SPDX-License-Identifier: Apache-2.0
// splat, merge, blur, spread, slice on the rows of a lattice.
#include <algorithm>
#include <cstring>

#include "dense_crf/lattice_rows.h"
#include "dense_crf/permutohedral.h"
#include "dense_crf/permutohedral_cpu.h"

namespace pydense::PYDENSE_ISA {
namespace {

// Adds the rows of later bands to a vertex's own, or copies its own to them.
template <class T, int Piece>
void merge_chunk(const LatticeRows<T>& rows, bool spread, int64_t begin, int64_t end) {
  const LatticeView<T>& lattice = rows.lattice;
  constexpr int64_t kAhead = 16;  // rows in flight
  const auto row_at = [&](int64_t i) {
    return rows.rows + int64_t{lattice.shared_rows[i]} * rows.width;
  };
  const int64_t last = lattice.shared_starts[end] - 1;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t own = lattice.shared_starts[s];
    for (int64_t i = own + kAhead; i < lattice.shared_starts[s + 1] + kAhead; ++i) {
      const T* ahead = row_at(std::min(i, last));
      for (int c = 0; c < rows.width; c += 16) {
        __builtin_prefetch(ahead + c, 1);
      }
      __builtin_prefetch(ahead + rows.width - 1, 1);
    }
    for (int c = 0; c < rows.width; c += Piece) {
      auto row = Row<T, Piece>::load_from(row_at(own) + c);
      for (int64_t i = own + 1; i < lattice.shared_starts[s + 1]; ++i) {
        if (spread) {
          row.store_to(row_at(i) + c);
        } else {
          row = row + Row<T, Piece>::load_from(row_at(i) + c);
        }
      }
      if (!spread) {
        row.store_to(row_at(own) + c);
      }
    }
  }
}

// Blurs the chains that start in [begin, end) of an axis, in place: v + (left + right) / 2. Walking
// along a chain, every row is read and written once. A vertex without neighbours stays as it is.
template <class T, int Piece>
void blur_chunk(const LatticeRows<T>& rows, const int32_t* chain, int64_t length, int64_t begin,
                int64_t end) {
  constexpr int64_t kAhead = 14;  // rows in flight
  constexpr auto kHalf = static_cast<T>(0.5);
  const int64_t width = rows.width;
  const auto row_of = [&](int64_t i) {
    const int32_t v = chain[i];
    return rows.rows + (v < 0 ? ~v : v) * width;
  };
  while (begin > 0 && begin < end && chain[begin - 1] >= 0) {
    ++begin;  // that chain belongs to the chunk before
  }
  for (int64_t first = begin; first < end;) {
    int64_t i = first;
    for (int c = 0; c < width; c += Piece) {
      auto left = Row<T, Piece>::zero();
      auto middle = Row<T, Piece>::load_from(row_of(first) + c);
      for (i = first; chain[i] >= 0; ++i) {
        const T* ahead = row_of(std::min(i + kAhead, length - 1));
        __builtin_prefetch(ahead + c, 1);
        __builtin_prefetch(ahead + c + Piece - 1, 1);
        const auto right = Row<T, Piece>::load_from(row_of(i + 1) + c);
        multiply_add(left + right, kHalf, middle).store_to(row_of(i) + c);
        left = middle;
        middle = right;
      }
      multiply_add(left, kHalf, middle).store_to(row_of(i) + c);
    }
    first = i + 1;
  }
}

// Calls work(band index, band, corners) for every band.
template <class T, class Work>
void for_each_band(const LatticeView<T>& lattice, ParallelFor parallel_for, const Work& work) {
  const BandGrid bands(lattice.grid);
  with_corners(lattice.dims, [&](auto corners) {
    const BandCorners<T, decltype(corners)::value> points(lattice);
    parallel_tasks(parallel_for, bands.count(), [&](int64_t b) { work(b, bands.at(b), points); });
  });
}

// Merge, an axis at a time, spread. (In this namespace, so that no lambda is visible outside.)
template <class T, int Piece>
void merge_blur_spread(const LatticeRows<T>& rows, bool reverse, ParallelFor parallel_for) {
  const LatticeView<T>& lattice = rows.lattice;
  static_assert(kMaxLatticeDims + 3 <= kMaxPhases);
  const int last = lattice.dims + 2;
  const auto axis_of = [&](int phase) { return reverse ? last - 1 - phase : phase - 1; };
  const auto size = [&](int phase) {
    if (phase == 0 || phase == last) {
      return lattice.num_shared;
    }
    const int axis = axis_of(phase);
    return lattice.chain_starts[axis + 1] - lattice.chain_starts[axis];
  };
  parallel_phases(
      parallel_for, last + 1, [&](int phase) { return ceil_div(size(phase), kVertexChunk); },
      [&](int phase, int64_t task) {
        const int64_t begin = task * kVertexChunk;
        const int64_t end = std::min(begin + kVertexChunk, size(phase));
        if (phase == 0 || phase == last) {
          merge_chunk<T, Piece>(rows, phase == last, begin, end);
        } else {
          const int32_t* chain = lattice.chains + lattice.chain_starts[axis_of(phase)];
          blur_chunk<T, Piece>(rows, chain, size(phase), begin, end);
        }
      });
}

template <class T, int Piece>
void filter_group(const FilterArgs<T>& args, const LatticeRows<T>& rows, int first, int channels,
                  ParallelFor parallel_for) {
  const LatticeView<T>& lattice = *args.lattice;
  // The transposed filter has the factors of the other side.
  const T* before = args.reverse ? lattice.slice_norm : lattice.splat_norm;
  const T* after = args.reverse ? lattice.splat_norm : lattice.slice_norm;
  const auto value = [&](int64_t pixel, int c) {
    return args.values[(first + c) * args.value_channel_stride + pixel * args.value_point_stride];
  };
  for_each_band(lattice, parallel_for, [&](int64_t b, const Band& band, const auto& corners) {
    clear_band(rows, b);
    T* to = rows.rows + lattice.band_rows[b] * rows.width;
    for_each_run(band, 1, [&](const Run& run) {
      const int64_t p = run.point;
      alignas(64) T row[Piece] = {};
      for (int c = 0; c < channels; ++c) {
        row[c] = value(run.pixel, c) * (before == nullptr ? T{1} : before[p]);
      }
      corners.template splat<Piece>(p, Row<T, Piece>::load_from(row), rows.width, to);
    });
  });
  merge_and_blur_cpu(rows, args.reverse, parallel_for);
  for_each_band(lattice, parallel_for, [&](int64_t b, const Band& band, const auto& corners) {
    const T* from = rows.rows + lattice.band_rows[b] * rows.width;
    for_each_run(band, 1, [&](const Run& run) {
      const int64_t p = run.point;
      const T factor = lattice.scale * (after == nullptr ? T{1} : after[p]);
      alignas(64) T row[Piece];
      (corners.template slice<Piece>(p, rows.width, from) * factor).store_to(row);
      for (int c = 0; c < channels; ++c) {
        const T own = lattice.self == nullptr ? T{0} : lattice.self[p] * value(run.pixel, c);
        args.out[(first + c) * args.out_channel_stride + run.pixel * args.out_point_stride] =
            row[c] - own;
      }
    });
  });
}

}  // namespace

template <class T>
void lattice_mass(const LatticeView<T>& lattice, T* mass, ParallelFor parallel_for) {
  const Buffer buffer = buffer_of<T>(static_cast<size_t>(lattice.num_rows));
  const LatticeRows<T> rows = {lattice, 1, buffer.as<T>()};
  for_each_band(lattice, parallel_for, [&](int64_t b, const Band& band, const auto& corners) {
    clear_band(rows, b);
    T* to = rows.rows + lattice.band_rows[b];
    const int64_t n = corners.corners();
    for (int64_t i = band.begin * n; i < band.end() * n; ++i) {
      to[corners.ids[i]] += corners.weights[i];
    }
  });
  merge_and_blur_cpu(rows, false, parallel_for);
  for_each_band(lattice, parallel_for, [&](int64_t b, const Band& band, const auto& corners) {
    const T* from = rows.rows + lattice.band_rows[b];
    for (int64_t p = band.begin; p < band.end(); ++p) {
      mass[p] = T{0};
      for (int64_t r = p * corners.corners(); r < (p + 1) * corners.corners(); ++r) {
        mass[p] += corners.weights[r] * from[corners.ids[r]];
      }
    }
  });
}

template <class T>
void merge_and_blur_cpu(const LatticeRows<T>& rows, bool reverse, ParallelFor parallel_for) {
  with_piece<T, 1>(rows.width, [&](auto piece) {
    merge_blur_spread<T, decltype(piece)::value>(rows, reverse, parallel_for);
  });
}

template <class T>
void filter_lattice_cpu(const FilterArgs<T>& args, ParallelFor parallel_for) {
  const LatticeView<T>& lattice = *args.lattice;
  // Channels at a time: a row in one piece, which also bounds the memory of the rows.
  constexpr int kGroup = sizeof(T) == sizeof(float) ? 32 : 8;
  const int width = row_width(std::min(args.channels, kGroup));
  const Buffer buffer = buffer_of<T>(
      checked_bytes(static_cast<size_t>(lattice.num_rows), static_cast<size_t>(width)));
  for (int first = 0; first < args.channels; first += kGroup) {
    const int channels = std::min(kGroup, args.channels - first);
    const LatticeRows<T> rows = {lattice, row_width(channels), buffer.as<T>()};
    with_piece<T, 1>(rows.width, [&](auto piece) {
      filter_group<T, decltype(piece)::value>(args, rows, first, channels, parallel_for);
    });
  }
}

template void lattice_mass(const LatticeView<float>&, float*, ParallelFor);
template void lattice_mass(const LatticeView<double>&, double*, ParallelFor);

extern const PermutohedralTable<float> kPermutohedralTable;
const PermutohedralTable<float> kPermutohedralTable = {build_lattice_cpu, filter_lattice_cpu<float>,
                                                       merge_and_blur_cpu<float>};
extern const PermutohedralTable<double> kPermutohedralTable64;
const PermutohedralTable<double> kPermutohedralTable64 = {
    build_lattice_cpu, filter_lattice_cpu<double>, merge_and_blur_cpu<double>};

}  // namespace pydense::PYDENSE_ISA
