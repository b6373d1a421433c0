// SPDX-License-Identifier: Apache-2.0
// splat, merge, blur, slice on the rows of a lattice.
#include <algorithm>
#include <cstring>

#include "dense_crf/lattice_rows.h"
#include "dense_crf/permutohedral.h"
#include "dense_crf/permutohedral_cpu.h"

namespace pydense::PYDENSE_ISA {
namespace {

template <int Piece>
void merge_chunk(const LatticeRows& rows, int64_t begin, int64_t end) {
  const LatticeView& lattice = rows.lattice;
  for (int64_t s = begin; s < end; ++s) {
    float* const row = rows.rows + int64_t{lattice.shared_vertices[s]} * rows.width;
    for (int c = 0; c < rows.width; c += Piece) {
      auto sum = Row<Piece>::load_from(row + c);
      for (int64_t e = lattice.shared_starts[s]; e < lattice.shared_starts[s + 1]; ++e) {
        sum = sum +
              Row<Piece>::load_from(rows.rows + int64_t{lattice.shared_rows[e]} * rows.width + c);
      }
      sum.store_to(row + c);
    }
  }
}

// Blurs the chains that start in [begin, end) of an axis, in place: v + (left + right) / 2. Walking
// along a chain, every row is read and written once. A vertex without neighbours stays as it is.
template <int Piece>
void blur_chunk(const LatticeRows& rows, const int32_t* chain, int64_t length, int64_t begin,
                int64_t end) {
  constexpr int64_t kAhead = 14;  // rows in flight
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
      auto left = Row<Piece>::zero();
      auto middle = Row<Piece>::load_from(row_of(first) + c);
      for (i = first; chain[i] >= 0; ++i) {
        const float* ahead = row_of(std::min(i + kAhead, length - 1));
        __builtin_prefetch(ahead + c, 1);
        __builtin_prefetch(ahead + c + Piece - 1, 1);
        const auto right = Row<Piece>::load_from(row_of(i + 1) + c);
        (middle + (left + right) * 0.5f).store_to(row_of(i) + c);
        left = middle;
        middle = right;
      }
      (middle + left * 0.5f).store_to(row_of(i) + c);
    }
    first = i + 1;
  }
}

// Runs work(lattice index, begin, end) over `size(view)` items of all lattices, with a task grid
// that depends on the lattices alone.
template <class Size, class Work>
void for_each_chunk(const LatticeRows* rows, int count, ParallelFor parallel_for, const Size& size,
                    const Work& work) {
  int64_t tasks = 0;
  for (int k = 0; k < count; ++k) {
    tasks += ceil_div(size(rows[k].lattice), kVertexChunk);
  }
  parallel_tasks(parallel_for, tasks, [&](int64_t task) {
    int k = 0;
    for (;; ++k) {
      const int64_t chunks = ceil_div(size(rows[k].lattice), kVertexChunk);
      if (task < chunks) {
        break;
      }
      task -= chunks;
    }
    const int64_t begin = task * kVertexChunk;
    work(k, begin, std::min(begin + kVertexChunk, size(rows[k].lattice)));
  });
}

template <int Piece>
void filter_group(const FilterArgs& args, const LatticeRows& rows, int first, int channels,
                  ParallelFor parallel_for) {
  const LatticeView& lattice = *args.lattice;
  const int corners = lattice.dims + 1;
  const auto points = [&](int64_t b) {
    return band_begin(lattice.num_points, lattice.num_bands, b);
  };
  parallel_tasks(parallel_for, lattice.num_bands, [&](int64_t b) {
    clear_band(rows, b);
    const LatticeEntry* entries = lattice.entries + lattice.band_entries[b];
    for (int64_t p = points(b); p < points(b + 1); ++p) {
      alignas(64) float row[Piece] = {};
      for (int c = 0; c < channels; ++c) {
        row[c] = args.values[(first + c) * args.value_channel_stride + p * args.value_point_stride];
      }
      splat_point(Row<Piece>::load_from(row), lattice.weights + p * corners,
                  lattice.point_entries + p * corners, entries, corners, rows.width, rows.rows);
    }
  });
  merge_and_blur_cpu(&rows, 1, args.reverse, parallel_for);
  parallel_tasks(parallel_for, lattice.num_bands, [&](int64_t b) {
    const LatticeEntry* entries = lattice.entries + lattice.band_entries[b];
    for (int64_t p = points(b); p < points(b + 1); ++p) {
      alignas(64) float row[Piece];
      (slice_point<Piece>(lattice.weights + p * corners, lattice.point_entries + p * corners,
                          entries, corners, rows.width, rows.rows) *
       lattice.alpha)
          .store_to(row);
      for (int c = 0; c < channels; ++c) {
        args.out[(first + c) * args.out_channel_stride + p * args.out_point_stride] = row[c];
      }
    }
  });
}

}  // namespace

void merge_and_blur_cpu(const LatticeRows* rows, int count, bool reverse,
                        ParallelFor parallel_for) {
  for_each_chunk(
      rows, count, parallel_for, [](const LatticeView& lattice) { return lattice.num_shared; },
      [&](int k, int64_t begin, int64_t end) {
        with_piece<1>(rows[k].width, [&](auto piece) {
          merge_chunk<decltype(piece)::value>(rows[k], begin, end);
        });
      });
  int stages = 0;
  for (int k = 0; k < count; ++k) {
    stages = std::max(stages, rows[k].lattice.dims + 1);
  }
  for (int stage = 0; stage < stages; ++stage) {
    const auto axis_of = [&](const LatticeView& lattice) {
      return reverse ? lattice.dims - stage : stage;
    };
    const auto length_of = [&](const LatticeView& lattice) {
      const int axis = axis_of(lattice);
      return stage <= lattice.dims ? lattice.chain_starts[axis + 1] - lattice.chain_starts[axis]
                                   : 0;
    };
    for_each_chunk(rows, count, parallel_for, length_of, [&](int k, int64_t begin, int64_t end) {
      const LatticeView& lattice = rows[k].lattice;
      const int32_t* chain = lattice.chains + lattice.chain_starts[axis_of(lattice)];
      with_piece<1>(rows[k].width, [&](auto piece) {
        blur_chunk<decltype(piece)::value>(rows[k], chain, length_of(lattice), begin, end);
      });
    });
  }
}

void filter_lattice_cpu(const FilterArgs& args, ParallelFor parallel_for) {
  const LatticeView& lattice = *args.lattice;
  constexpr int kGroup = 32;  // channels at a time: bounds the memory of the rows
  const int width = row_width(std::min(args.channels, kGroup));
  const Buffer buffer = buffer_of<float>(
      checked_bytes(static_cast<size_t>(lattice.num_rows()), static_cast<size_t>(width)));
  for (int first = 0; first < args.channels; first += kGroup) {
    const int channels = std::min(kGroup, args.channels - first);
    const LatticeRows rows = {lattice, row_width(channels), buffer.as<float>()};
    with_piece<1>(rows.width, [&](auto piece) {
      filter_group<decltype(piece)::value>(args, rows, first, channels, parallel_for);
    });
  }
}

extern const PermutohedralTable kPermutohedralTable;
const PermutohedralTable kPermutohedralTable = {build_lattice_cpu, filter_lattice_cpu,
                                                merge_and_blur_cpu};

}  // namespace pydense::PYDENSE_ISA
