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
  constexpr int64_t kAhead = 48;  // rows in flight
  const auto row_at = [&](int64_t i) {
    return rows.rows + int64_t{lattice.shared_rows[i]} * rows.width;
  };
  const int64_t last = lattice.shared_starts[end] - 1;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t own = lattice.shared_starts[s];
    for (int64_t i = own + kAhead; i < lattice.shared_starts[s + 1] + kAhead; ++i) {
      prefetch_row<1>(row_at(std::min(i, last)), rows.width);
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

// Blurs chains of neighbours, in place: v + (left + right) / 2. A vertex without neighbours stays
// as it is.
template <class T, int Piece>
class ChainBlur {
 public:
  ChainBlur(const LatticeRows<T>& rows, const int32_t* chain)
      : rows_(rows.rows), width_(rows.width), chain_(chain) {}

  // The chains that start in [begin, end). Short ones are sorted by length: each length has code of
  // its own, which branches alike for all of its chains.
  void run(int64_t begin, int64_t end) const {
    while (begin > 0 && begin < end && chain_[begin - 1] >= 0) {
      ++begin;  // that chain belongs to the chunk before
    }
    int64_t i = begin;
    for_each_length([&](auto length) {
      for (; i < end && is_chain<decltype(length)::value>(i); i += length) {
        blur_short<decltype(length)::value>(i);
      }
    });
    while (i < end) {
      i = blur_any(i);
    }
  }

 private:
  using PieceRow = Row<T, Piece>;
  static constexpr T kHalf = static_cast<T>(0.5);

  template <class Fn>
  static PYDENSE_HD void for_each_length(const Fn& fn) {
    static_assert(kLongChain == 8);
    fn(IntConstant<2>{});
    fn(IntConstant<3>{});
    fn(IntConstant<4>{});
    fn(IntConstant<5>{});
    fn(IntConstant<6>{});
    fn(IntConstant<7>{});
  }

  template <int Length>
  PYDENSE_HD bool is_chain(int64_t first) const {
    for (int k = 0; k < Length - 1; ++k) {
      if (chain_[first + k] < 0) {
        return false;
      }
    }
    return chain_[first + Length - 1] < 0;
  }

  PYDENSE_HD T* row_at(int64_t i) const {
    const int32_t row = chain_[i];
    return rows_ + (row ^ (row >> 31)) * width_;  // row or ~row
  }

  PYDENSE_HD void prefetch(int64_t i, int64_t c) const {
    prefetch_row<1>(row_at(i + kChainPadding) + c, Piece);
  }

  template <int Length>
  PYDENSE_HD void blur_short(int64_t first) const {
    T* row[Length];
    for (int k = 0; k < Length; ++k) {
      row[k] = row_at(first + k);
    }
    for (int64_t c = 0; c < width_; c += Piece) {
      auto left = PieceRow::zero();
      auto middle = PieceRow::load_from(row[0] + c);
#pragma GCC unroll 8
      for (int k = 0; k < Length; ++k) {
        prefetch(first + k, c);
        const auto right = k + 1 < Length ? PieceRow::load_from(row[k + 1] + c) : PieceRow::zero();
        multiply_add(left + right, kHalf, middle).store_to(row[k] + c);
        left = middle;
        middle = right;
      }
    }
  }

  // Returns where the next chain starts.
  PYDENSE_HD int64_t blur_any(int64_t first) const {
    int64_t i = first;
    for (int64_t c = 0; c < width_; c += Piece) {
      auto left = PieceRow::zero();
      auto middle = PieceRow::load_from(row_at(first) + c);
      for (i = first; chain_[i] >= 0; ++i) {
        prefetch(i, c);
        const auto right = PieceRow::load_from(row_at(i + 1) + c);
        multiply_add(left + right, kHalf, middle).store_to(row_at(i) + c);
        left = middle;
        middle = right;
      }
      multiply_add(left, kHalf, middle).store_to(row_at(i) + c);
    }
    return i + 1;
  }

  T* rows_;
  int64_t width_;
  const int32_t* chain_;
};

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
          ChainBlur<T, Piece>(rows, chain).run(begin, end);
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
