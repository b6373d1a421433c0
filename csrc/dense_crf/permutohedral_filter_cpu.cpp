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
  for (int64_t v = begin; v < end; ++v) {
    const int64_t first = lattice.vertex_entries[v];
    const int64_t last = lattice.vertex_entries[v + 1];
    for (int c = 0; c < rows.width; c += Piece) {
      auto sum =
          Row<Piece>::load_from(rows.entry_rows + int64_t{lattice.merge[first]} * rows.width + c);
      for (int64_t e = first + 1; e < last; ++e) {
        sum = sum +
              Row<Piece>::load_from(rows.entry_rows + int64_t{lattice.merge[e]} * rows.width + c);
      }
      sum.store_to(rows.vertex_rows + v * rows.width + c);
    }
  }
}

template <int Piece>
void blur_chunk(const LatticeRows& rows, int axis, const float* from, float* to, int64_t begin,
                int64_t end) {
  const int64_t width = rows.width;
  const int32_t* neighbours = rows.lattice.neighbours + axis * rows.lattice.num_vertices * 2;
  for (int64_t v = begin; v < end; ++v) {
    const float* low = from + neighbours[2 * v] * width;
    const float* high = from + neighbours[2 * v + 1] * width;
    for (int c = 0; c < width; c += Piece) {
      const auto sides = Row<Piece>::load_from(low + c) + Row<Piece>::load_from(high + c);
      (Row<Piece>::load_from(from + v * width + c) + sides * 0.5f).store_to(to + v * width + c);
    }
  }
}

// Runs work(lattice index, first vertex, end) over the vertices of all lattices, with a task grid
// that depends on the lattices alone.
template <class Work>
void for_each_chunk(const LatticeRows* rows, int count, ParallelFor parallel_for,
                    const Work& work) {
  int64_t tasks = 0;
  for (int k = 0; k < count; ++k) {
    tasks += ceil_div(rows[k].lattice.num_vertices, kVertexChunk);
  }
  parallel_tasks(parallel_for, tasks, [&](int64_t task) {
    int k = 0;
    for (;; ++k) {
      const int64_t chunks = ceil_div(rows[k].lattice.num_vertices, kVertexChunk);
      if (task < chunks) {
        break;
      }
      task -= chunks;
    }
    const int64_t begin = task * kVertexChunk;
    work(k, begin, std::min(begin + kVertexChunk, rows[k].lattice.num_vertices));
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
    float* band = rows.entry_rows + lattice.band_entries[b] * rows.width;
    std::memset(
        band, 0,
        static_cast<size_t>((lattice.band_entries[b + 1] - lattice.band_entries[b]) * rows.width) *
            sizeof(float));
    for (int64_t p = points(b); p < points(b + 1); ++p) {
      alignas(64) float row[Piece] = {};
      for (int c = 0; c < channels; ++c) {
        row[c] = args.values[(first + c) * args.value_channel_stride + p * args.value_point_stride];
      }
      splat_point(Row<Piece>::load_from(row), lattice.weights + p * corners,
                  lattice.entries + p * corners, corners, rows.width, band);
    }
  });
  merge_and_blur_cpu(&rows, 1, args.reverse, parallel_for);
  const float* blurred = rows.vertex_rows + blurred_rows_offset(lattice, rows.width);
  parallel_tasks(parallel_for, lattice.num_bands, [&](int64_t b) {
    const int32_t* entry_vertex = lattice.entry_vertex + lattice.band_entries[b];
    for (int64_t p = points(b); p < points(b + 1); ++p) {
      alignas(64) float row[Piece];
      (slice_point<Piece>(lattice.weights + p * corners, lattice.entries + p * corners,
                          entry_vertex, corners, rows.width, blurred) *
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
  int stages = 0;
  for (int k = 0; k < count; ++k) {
    const LatticeView& lattice = rows[k].lattice;
    stages = std::max(stages, lattice.dims + 1);
    for (int64_t side = 1; side <= 2; ++side) {
      float* nothing =
          rows[k].vertex_rows + (side * (lattice.num_vertices + 1) - 1) * rows[k].width;
      std::memset(nothing, 0, static_cast<size_t>(rows[k].width) * sizeof(float));
    }
  }
  for_each_chunk(rows, count, parallel_for, [&](int k, int64_t begin, int64_t end) {
    with_piece<1>(rows[k].width,
                  [&](auto piece) { merge_chunk<decltype(piece)::value>(rows[k], begin, end); });
  });
  for (int stage = 0; stage < stages; ++stage) {
    for_each_chunk(rows, count, parallel_for, [&](int k, int64_t begin, int64_t end) {
      const LatticeView& lattice = rows[k].lattice;
      if (stage > lattice.dims) {
        return;
      }
      const int64_t side = (lattice.num_vertices + 1) * rows[k].width;
      const float* from = rows[k].vertex_rows + (stage % 2 == 0 ? 0 : side);
      float* to = rows[k].vertex_rows + (stage % 2 == 0 ? side : 0);
      const int axis = reverse ? lattice.dims - stage : stage;
      with_piece<1>(rows[k].width, [&](auto piece) {
        blur_chunk<decltype(piece)::value>(rows[k], axis, from, to, begin, end);
      });
    });
  }
}

void filter_lattice_cpu(const FilterArgs& args, ParallelFor parallel_for) {
  const LatticeView& lattice = *args.lattice;
  constexpr int kGroup = 32;  // channels at a time: bounds the memory of the rows
  const int width = row_width(std::min(args.channels, kGroup));
  const Buffer entry_rows = buffer_of<float>(static_cast<size_t>(lattice.num_entries) * width);
  const Buffer vertex_rows =
      buffer_of<float>(static_cast<size_t>(lattice.num_vertices + 1) * 2 * width);
  for (int first = 0; first < args.channels; first += kGroup) {
    const int channels = std::min(kGroup, args.channels - first);
    const LatticeRows rows = {lattice, row_width(channels), entry_rows.as<float>(),
                              vertex_rows.as<float>()};
    with_piece<1>(rows.width, [&](auto piece) {
      filter_group<decltype(piece)::value>(args, rows, first, channels, parallel_for);
    });
  }
}

extern const PermutohedralTable kPermutohedralTable;
const PermutohedralTable kPermutohedralTable = {build_lattice_cpu, filter_lattice_cpu,
                                                merge_and_blur_cpu};

}  // namespace pydense::PYDENSE_ISA
