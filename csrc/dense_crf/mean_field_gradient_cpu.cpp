// SPDX-License-Identifier: Apache-2.0
// The backward pass over the points. As in the forward pass, a point's rows stay in the L1 cache
// from the slice to the softmax, and what is splatted waits in the second-level cache until the
// band's points have been sliced.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/simd.h"
#include "dense_crf/label_blocks.h"
#include "dense_crf/lattice_rows.h"
#include "dense_crf/mean_field_gradient.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int kBlock = 16;       // points
constexpr int kBlocksOfSum = 8;  // summed in T before they are added to the band's double sums

// Width is that of a row, or 0 where it is known at run time alone.
template <class T, int Piece, int Width>
class GradientBand {
 public:
  GradientBand(const GradientPass<T>& pass, int64_t band)
      : pass_(pass),
        band_(band),
        points_(BandGrid(pass.grid).at(band)),
        kept_(pass.splat ? points_.end() - points_.begin : kBlock),
        sum_values_(pass.grad.data == nullptr ? pass.band_sums : 0),
        buffer_(pass.workspace->take(
            sizeof(T) * static_cast<size_t>(pass.width * (kept_ + 3 * kBlock + 1) + sum_values_))),
        gradient_(buffer_.as<T>()),
        part_(gradient_ + kept_ * pass.width),
        q_(part_ + int64_t{kBlock} * pass.width),
        out_(q_ + int64_t{kBlock} * pass.width),
        products_(out_ + int64_t{kBlock} * pass.width),
        sums_(products_ + pass.width) {
    std::fill(sums_, sums_ + sum_values_, T{0});
  }
  GradientBand(const GradientBand&) = delete;
  GradientBand& operator=(const GradientBand&) = delete;
  ~GradientBand() { pass_.workspace->give_back(std::move(buffer_)); }

  void run() {
    int blocks = 0;
    for_each_run(points_, kBlock, [&](const Run& block) {
      const T* q = distribution(block);
      if (pass_.grad.data != nullptr) {
        load_block(pass_.grad, block, pass_.num_labels, width(), T{1}, T{0}, gradient_);
      } else {
        messages(block, q);
        if (++blocks % kBlocksOfSum == 0) {
          add_sums();
        }
      }
      if (pass_.q_out.data != nullptr) {
        store_block(gradient_, block, pass_.num_labels, width(), pass_.q_out);
      }
      finish(block, q);
      if (pass_.splat) {
        gradient_ += block.count * width();
      }
    });
    add_sums();
    if (!pass_.splat) {
      return;
    }
    for (int k = 0; k < pass_.num_terms; ++k) {
      clear_band<T>({pass_.terms[k].lattice, pass_.width, pass_.terms[k].rows}, band_);
    }
    gradient_ = buffer_.as<T>();
    for_each_run(points_, kBlock, [&](const Run& block) {
      for (int k = 0; k < pass_.num_terms; ++k) {
        const PairwiseView<T>& view = pass_.terms[k];
        with_corners(view.lattice.dims, [&](auto corners) {
          splat<decltype(corners)::value>(view, block.point, block.count);
        });
      }
      gradient_ += block.count * width();
    });
  }

 private:
  using PieceRow = Row<T, Piece>;

  PYDENSE_HD int64_t width() const { return Width > 0 ? Width : pass_.width; }

  const T* distribution(const Run& block) const {
    if (pass_.q_rows != nullptr) {
      return pass_.q_rows + block.pixel * width();
    }
    if (pass_.q.data != nullptr) {
      load_block(pass_.q, block, pass_.num_labels, width(), T{1}, T{0}, q_);
    }
    return q_;
  }

  // gradient_ = sum_k C_k^T P_k, and the sums of P_k Q^T.
  PYDENSE_HD void messages(const Run& block, const T* q) const {
    std::memset(gradient_, 0, static_cast<size_t>(block.count * width()) * sizeof(T));
    for (int k = 0; k < pass_.num_terms; ++k) {
      const PairwiseView<T>& view = pass_.terms[k];
      with_corners(view.lattice.dims,
                   [&](auto corners) { slice<decltype(corners)::value>(view, block); });
      T* sums = sums_ + pass_.sum_begin[k];
      if (view.compatibility == Compatibility::kMatrix) {
        apply_matrix(pass_.transposed[k], block.count);
        add_outer(q, block.count, sums);
      } else {
        apply_diagonal(view, q, block.count, sums);
      }
    }
  }

  // part_ = P_k.
  template <int Corners>
  PYDENSE_HD void slice(const PairwiseView<T>& view, const Run& block) const {
    const LatticeView<T>& lattice = view.lattice;
    const BandCorners<T, Corners> corners(lattice);
    const T* rows = view.rows + lattice.band_rows[band_] * width();
    for (int i = 0; i < block.count; ++i) {
      const int64_t p = block.point + i;
      const T factor =
          lattice.splat_norm == nullptr ? lattice.scale : lattice.scale * lattice.splat_norm[p];
      const T* later =
          lattice.self == nullptr ? nullptr : pass_.later + (block.pixel + i) * width();
      for (int64_t c = 0; c < width(); c += Piece) {
        PieceRow sliced = corners.template slice<Piece>(p, width(), rows + c) * factor;
        if (lattice.self != nullptr) {
          sliced = multiply_add(PieceRow::load_from(later + c), -lattice.self[p], sliced);
        }
        sliced.store_to(part_ + i * width() + c);
      }
    }
  }

  PYDENSE_HD void apply_diagonal(const PairwiseView<T>& view, const T* q, int count,
                                 T* sums) const {
    const bool potts = view.compatibility == Compatibility::kPotts;
    for (int64_t c = 0; c < width(); c += Piece) {
      const PieceRow factor =
          potts ? PieceRow::all(view.self_scale) : PieceRow::load_from(view.compat + c);
      PieceRow sum = PieceRow::load_from(sums + c);
      for (int i = 0; i < count; ++i) {
        const int64_t at = i * width() + c;
        const PieceRow part = PieceRow::load_from(part_ + at);
        sum = multiply_add(part, PieceRow::load_from(q + at), sum);
        multiply_add(part, factor, PieceRow::load_from(gradient_ + at)).store_to(gradient_ + at);
      }
      sum.store_to(sums + c);
    }
  }

  // gradient_ += C^T part_, with the matrix row by row.
  PYDENSE_HD void apply_matrix(const T* matrix, int count) const {
    for (int i = 0; i < count; ++i) {
      const T* part = part_ + i * width();
      for (int64_t c = 0; c < width(); c += Piece) {
        PieceRow sum = PieceRow::load_from(gradient_ + i * width() + c);
        for (int l = 0; l < pass_.num_labels; ++l) {
          sum = multiply_add(PieceRow::load_from(matrix + l * width() + c), part[l], sum);
        }
        sum.store_to(gradient_ + i * width() + c);
      }
    }
  }

  // sums[l] += sum over points of part_[l] q.
  PYDENSE_HD void add_outer(const T* q, int count, T* sums) const {
    for (int l = 0; l < pass_.num_labels; ++l) {
      for (int64_t c = 0; c < width(); c += Piece) {
        PieceRow sum = PieceRow::load_from(sums + l * width() + c);
        for (int i = 0; i < count; ++i) {
          sum = multiply_add(PieceRow::load_from(q + i * width() + c), part_[i * width() + l], sum);
        }
        sum.store_to(sums + l * width() + c);
      }
    }
  }

  void add_sums() const {
    double* to = pass_.sums + band_ * pass_.band_sums;
    for (int64_t i = 0; i < sum_values_; ++i) {
      to[i] += static_cast<double>(sums_[i]);
      sums_[i] = T{0};
    }
  }

  // From dL/dQ to dL/dZ, and where that goes.
  PYDENSE_HD void finish(const Run& block, const T* q) const {
    const int64_t at = block.pixel * width();
    const bool counts = pass_.q_out.data == nullptr;  // else Q is given: there is no Z behind it
    for (int i = 0; i < block.count; ++i) {
      T* gradient = gradient_ + i * width();
      const T* q_row = q + i * width();
      if (pass_.softmax && counts) {
        for (int64_t c = 0; c < width(); c += Piece) {
          (PieceRow::load_from(gradient + c) * PieceRow::load_from(q_row + c))
              .store_to(products_ + c);
        }
        const PieceRow mean = PieceRow::all(row_sum<T, Piece>(products_, width()));
        for (int64_t c = 0; c < width(); c += Piece) {
          ((PieceRow::load_from(gradient + c) - mean) * PieceRow::load_from(q_row + c))
              .store_to(gradient + c);
        }
      }
      T* total = pass_.total == nullptr ? nullptr : pass_.total + at + i * width();
      for (int64_t c = 0; c < width(); c += Piece) {
        PieceRow sum = counts ? PieceRow::load_from(gradient + c) : PieceRow::zero();
        if (!pass_.first) {
          sum = sum + PieceRow::load_from(total + c);
        }
        if (pass_.out.data != nullptr) {
          (sum * pass_.sign).store_to(out_ + i * width() + c);
        } else {
          sum.store_to(total + c);
        }
      }
    }
    if (pass_.out.data != nullptr) {
      store_block(out_, block, pass_.num_labels, width(), pass_.out);
    }
    if (pass_.step != nullptr) {
      std::memcpy(pass_.step + at, gradient_,
                  static_cast<size_t>(block.count * width()) * sizeof(T));
    }
  }

  template <int Corners>
  PYDENSE_HD void splat(const PairwiseView<T>& view, int64_t p, int count) const {
    const LatticeView<T>& lattice = view.lattice;
    const BandCorners<T, Corners> corners(lattice);
    T* rows = view.rows + lattice.band_rows[band_] * width();
    for (int i = 0; i < count; ++i) {
      const T norm = lattice.slice_norm == nullptr ? T{1} : lattice.slice_norm[p + i];
      for (int64_t c = 0; c < width(); c += Piece) {
        corners.template splat<Piece>(
            p + i, PieceRow::load_from(gradient_ + i * width() + c) * norm, width(), rows + c);
      }
    }
  }

  const GradientPass<T>& pass_;
  const int64_t band_;
  const Band points_;
  const int64_t kept_;  // points whose gradient is kept
  const int64_t sum_values_;
  Buffer buffer_;
  T* gradient_;  // [kBlock, width], the current block's
  T* part_;      // [kBlock, width]
  T* q_;         // [kBlock, width]
  T* out_;       // [kBlock, width]
  T* products_;  // [width]
  T* sums_;      // [sum_values_]
};

template <class T, int Piece, int Width>
void run_bands(const GradientPass<T>& pass, ParallelFor parallel_for) {
  parallel_tasks(parallel_for, BandGrid(pass.grid).count(),
                 [&](int64_t b) { GradientBand<T, Piece, Width>(pass, b).run(); });
}

template <class T>
void gradient_pass_cpu(const GradientPass<T>& pass, ParallelFor parallel_for) {
  with_piece<T, 2>(pass.width, [&](auto piece) {
    constexpr int kPiece = decltype(piece)::value;
    if (pass.width == kPiece) {
      run_bands<T, kPiece, kPiece>(pass, parallel_for);
    } else {
      run_bands<T, kPiece, 0>(pass, parallel_for);
    }
  });
}

}  // namespace

extern const MeanFieldGradientTable<float> kMeanFieldGradientTable;
const MeanFieldGradientTable<float> kMeanFieldGradientTable = {gradient_pass_cpu<float>};
extern const MeanFieldGradientTable<double> kMeanFieldGradientTable64;
const MeanFieldGradientTable<double> kMeanFieldGradientTable64 = {gradient_pass_cpu<double>};

}  // namespace pydense::PYDENSE_ISA
