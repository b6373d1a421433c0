// SPDX-License-Identifier: Apache-2.0
// The pass over the points: slice all terms, add the unary, softmax, splat for the next iteration,
// all while a point's row is in the L1 cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/simd.h"
#include "common/simd_lanes.h"
#include "dense_crf/label_blocks.h"
#include "dense_crf/lattice_rows.h"
#include "dense_crf/mean_field.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int kBlock = 16;  // points; a block's rows fit the L1 cache

// Width is that of a row, or 0 where it is known at run time alone (rows of more than one piece).
template <class T, int Piece, int Width>
class BandPass {
 public:
  BandPass(const PointPass<T>& pass, int64_t band)
      : pass_(pass),
        band_(band),
        points_(BandGrid(pass.grid).at(band)),
        kept_(pass.splat && pass.messages ? points_.end() - points_.begin : kBlock),
        rows_(pass.workspace->take(sizeof(T) * static_cast<size_t>(pass.width) *
                                   static_cast<size_t>(kept_ + kBlock + 1))),
        q_(rows_.as<T>()),
        logits_(q_ + kept_ * pass.width),
        filtered_(logits_ + int64_t{kBlock} * pass.width) {
    for (int k = 0; pass.messages && k < pass.num_terms; ++k) {
      takes_self_ = takes_self_ || pass.terms[k].lattice.self != nullptr;
    }
  }

  BandPass(const BandPass&) = delete;
  BandPass& operator=(const BandPass&) = delete;
  ~BandPass() { pass_.workspace->give_back(std::move(rows_)); }

  // False when a distribution is not finite. Points go through the stages in blocks: one point's
  // chain of dependent operations is longer than what a core looks ahead, several points' are not.
  // Slices and splats work on the same rows: where a pass has both, the band's Q waits in the
  // second-level cache until all of its points have been sliced.
  bool run() {
    bool finite = true;
    const bool splat_later = pass_.splat && pass_.messages;
    if (pass_.splat && !splat_later) {
      clear_rows();
    }
    for_each_run(points_, kBlock, [&](const Run& block) {
      finite = update(block) && finite;
      if (pass_.kept != nullptr) {
        std::memcpy(pass_.kept + block.pixel * width(), q_,
                    static_cast<size_t>(block.count * width()) * sizeof(T));
      }
      if (pass_.out != nullptr) {
        store_result(block);
      }
      if (splat_later) {
        q_ += block.count * width();
      } else if (pass_.splat) {
        splat_block(block);
      }
    });
    if (splat_later) {
      clear_rows();
      q_ = rows_.as<T>();
      for_each_run(points_, kBlock, [&](const Run& block) {
        splat_block(block);
        q_ += block.count * width();
      });
    }
    return finite;
  }

 private:
  using PieceRow = Row<T, Piece>;
  static constexpr int kLanes = RowParts<T, Piece>::kLanes;
  using Part = typename RowParts<T, Piece>::Part;

  PYDENSE_HD int64_t width() const { return Width > 0 ? Width : pass_.width; }

  // Q of a block, loaded or computed.
  bool update(const Run& block) {
    if (!pass_.compute || takes_self_) {
      load_block(pass_.q_in, block, pass_.num_labels, width(), T{1}, T{0}, q_);
    }
    if (pass_.free_energy != nullptr) {
      measure(block);
    }
    if (!pass_.compute) {
      return true;
    }
    load_unary(block);
    add_messages(block);
    if (pass_.out != nullptr && pass_.out->kind == MeanFieldOutput::kLogits) {
      return logits_finite(block.count);
    }
    return softmax(block.count);
  }

  void clear_rows() const {
    for (int k = 0; k < pass_.num_terms; ++k) {
      clear_band<T>({pass_.terms[k].lattice, pass_.width, pass_.terms[k].rows}, band_);
    }
  }

  void splat_block(const Run& block) const {
    for (int k = 0; k < pass_.num_terms; ++k) {
      const PairwiseView<T>& view = pass_.terms[k];
      with_corners(view.lattice.dims, [&](auto corners) {
        splat<decltype(corners)::value>(view, block.point, block.count);
      });
    }
  }

  PYDENSE_HD bool reads_rows() const {
    return pass_.unary_rows != nullptr && !pass_.fill_unary_rows;
  }

  PYDENSE_HD void load_unary(const Run& block) const {
    constexpr T kPadding = -std::numeric_limits<T>::infinity();
    const int labels = pass_.num_labels;
    T* const rows = pass_.unary_rows == nullptr ? nullptr : pass_.unary_rows + block.point * labels;
    if (reads_rows()) {
      load_rows<Piece>(rows, block.count, labels, width(), kPadding, logits_);
      return;
    }
    if (pass_.unary.data != nullptr) {
      load_block(pass_.unary, block, labels, width(), pass_.energies ? T{-1} : T{1}, kPadding,
                 logits_);
      if (rows != nullptr) {
        store_rows(logits_, block.count, labels, width(), rows);
      }
      return;
    }
    for (int i = 0; i < block.count; ++i) {
      for (int64_t l = 0; l < width(); ++l) {
        logits_[i * width() + l] = l < labels ? T{0} : kPadding;
      }
    }
  }

  // The unary that a later run reads, and the lines its result goes to.
  PYDENSE_HD void prefetch_part(const Run& block, int part, int parts) const {
    if (reads_rows()) {
      for (int i = part; i < kBlock; i += parts) {
        const int64_t ahead = std::min(block.point + kBlock + i, points_.end() - 1);
        prefetch_row<0>(pass_.unary_rows + ahead * pass_.num_labels, pass_.num_labels);
      }
    } else if (pass_.unary.data != nullptr && pass_.unary.point_stride == 1) {
      prefetch_ahead<0>(pass_.unary, block, pass_.num_labels, part, parts);
    }
    if (pass_.out != nullptr && pass_.out->kind != MeanFieldOutput::kLabels &&
        pass_.out->q.point_stride == 1) {
      prefetch_ahead<1>(pass_.out->q, block, pass_.num_labels, part, parts);
    }
  }

  PYDENSE_HD void add_messages(const Run& block) const {
    for (int k = 0; pass_.messages && k < pass_.num_terms; ++k) {
      const PairwiseView<T>& view = pass_.terms[k];
      with_corners(view.lattice.dims,
                   [&](auto corners) { slice<decltype(corners)::value>(view, block, k == 0); });
    }
    if (!pass_.messages || pass_.num_terms == 0) {
      prefetch_part(block, 0, 1);
    }
  }

  // Asks for the rows of the point a block after point p, where they are far.
  template <int Corners>
  PYDENSE_HD void prefetch_corners(const BandCorners<T, Corners>& corners, int64_t p,
                                   const T* rows) const {
    corners.prefetch(std::min(p + kBlock, points_.end() - 1), width(), rows);
  }

  template <int Corners>
  PYDENSE_HD void slice(const PairwiseView<T>& view, const Run& block, bool prefetch) const {
    const int64_t p = block.point;
    const int count = block.count;
    const LatticeView<T>& lattice = view.lattice;
    const BandCorners<T, Corners> corners(lattice);
    const T* rows = view.rows + lattice.band_rows[band_] * width();
    const bool far = are_far(lattice, band_, width());
    const bool simple = view.compatibility == Compatibility::kPotts && lattice.self == nullptr;
    for (int i = 0; i < count; ++i) {
      const T factor =
          lattice.slice_norm == nullptr ? view.scale : view.scale * lattice.slice_norm[p + i];
      T* logits = logits_ + i * width();
      if (prefetch) {
        prefetch_part(block, i, count);
      }
      if (far) {
        prefetch_corners(corners, p + i, rows);
      }
      for (int64_t c = 0; c < width(); c += Piece) {
        const PieceRow sliced = corners.template slice<Piece>(p + i, width(), rows + c);
        const PieceRow sum = PieceRow::load_from(logits + c);
        if (simple) {
          multiply_add(sliced, factor, sum).store_to(logits + c);
          continue;
        }
        PieceRow message = sliced * factor;
        if (lattice.self != nullptr) {
          message = multiply_add(PieceRow::load_from(q_ + i * width() + c),
                                 -lattice.self[p + i] * view.self_scale, message);
        }
        switch (view.compatibility) {
          case Compatibility::kPotts:
            (sum + message).store_to(logits + c);
            break;
          case Compatibility::kDiagonal:
            multiply_add(message, PieceRow::load_from(view.compat + c), sum).store_to(logits + c);
            break;
          case Compatibility::kMatrix:
            message.store_to(filtered_ + c);
            break;
        }
      }
      if (view.compatibility == Compatibility::kMatrix) {
        multiply(view.compat, filtered_, logits);
      }
    }
  }

  PYDENSE_HD void multiply(const T* columns, const T* message, T* logits) const {
    for (int64_t c = 0; c < width(); c += Piece) {
      PieceRow sum = PieceRow::load_from(logits + c);
      for (int l = 0; l < pass_.num_labels; ++l) {
        sum = multiply_add(PieceRow::load_from(columns + l * width() + c), message[l], sum);
      }
      sum.store_to(logits + c);
    }
  }

  // q = softmax(logits) for the points of a block.
  PYDENSE_HD bool softmax(int count) const {
    T tops[kBlock];
    for (int i = 0; i < count; ++i) {
      const T* logits = logits_ + i * width();
      Part highest = load<Part>(logits);
      for (int64_t c = kLanes; c < width(); c += kLanes) {
        highest = max(highest, load<Part>(logits + c));
      }
      tops[i] = lane_max<kLanes>(highest);
    }
    for (int i = 0; i < count; ++i) {
      for (int64_t c = 0; c < width(); c += Piece) {
        const PieceRow row = PieceRow::load_from(logits_ + i * width() + c);
        PieceRow::from([&](auto part) {
          return exp_nonpositive<true>(part(row) - tops[i]);
        }).store_to(q_ + i * width() + c);
      }
    }
    // The divisions of all points at once: one takes as long as a vector of them.
    alignas(64) T sums[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      sums[i] = i < count ? row_sum<T, Piece>(q_ + i * width(), width()) : T{1};
    }
    const auto most = static_cast<T>(pass_.num_labels) * static_cast<T>(1.001);
    alignas(64) T inverses[kBlock];
    bool finite = true;
    for (int i = 0; i < kBlock; i += kLanes) {
      const Part sum = load<Part>(sums + i);
      store(inverses + i, T{1} / sum);
      // The largest term is e^0; a NaN or infinity anywhere breaks one of the two.
      finite = finite && !any_lane(~((sum >= T{1}) & (sum <= most)));
    }
    for (int i = 0; i < count; ++i) {
      for (int64_t c = 0; c < width(); c += Piece) {
        T* q = q_ + i * width() + c;
        (PieceRow::load_from(q) * inverses[i]).store_to(q);
      }
    }
    return finite;
  }

  // What softmax would refuse: NaN, +inf, or nothing but -inf.
  bool logits_finite(int count) const {
    bool finite = true;
    for (int i = 0; i < count; ++i) {
      T top = -std::numeric_limits<T>::infinity();
      bool number = true;
      for (int l = 0; l < pass_.num_labels; ++l) {
        const T value = logits_[i * width() + l];
        number = number && value == value;
        top = value > top ? value : top;
      }
      finite = finite && number && top - top == T{0};
    }
    return finite;
  }

  void store_result(const Run& block) const {
    const MeanFieldResult<T>& out = *pass_.out;
    if (out.kind != MeanFieldOutput::kLabels) {
      store_block(out.kind == MeanFieldOutput::kLogits ? logits_ : q_, block, pass_.num_labels,
                  width(), out.q);
      return;
    }
    for (int i = 0; i < block.count; ++i) {
      const T* q = q_ + i * width();
      int best = 0;
      for (int l = 1; l < pass_.num_labels; ++l) {
        best = q[l] > q[best] ? l : best;
      }
      out.labels[block.pixel + i] = best;
    }
  }

  template <int Corners>
  PYDENSE_HD void splat(const PairwiseView<T>& view, int64_t p, int count) const {
    const LatticeView<T>& lattice = view.lattice;
    const BandCorners<T, Corners> corners(lattice);
    T* rows = view.rows + lattice.band_rows[band_] * width();
    const bool far = are_far(lattice, band_, width());
    for (int i = 0; i < count; ++i) {
      if (far) {
        prefetch_corners(corners, p + i, rows);
      }
      const T norm = lattice.splat_norm == nullptr ? T{1} : lattice.splat_norm[p + i];
      for (int64_t c = 0; c < width(); c += Piece) {
        corners.template splat<Piece>(p + i, PieceRow::load_from(q_ + i * width() + c) * norm,
                                      width(), rows + c);
      }
    }
  }

  // Adds the points' sums over q_in to the band's. What has no probability counts nothing, also
  // where its energy is infinite.
  void measure(const Run& block) const {
    FreeEnergy& sums = pass_.free_energy[band_];
    const auto against_logits = [&] {
      double sum = 0.0;
      for (int i = 0; i < block.count; ++i) {
        for (int l = 0; l < pass_.num_labels; ++l) {
          const auto q = static_cast<double>(q_[i * width() + l]);
          sum += q == 0.0 ? 0.0 : q * static_cast<double>(logits_[i * width() + l]);
        }
      }
      return sum;
    };
    for (int i = 0; i < block.count; ++i) {
      for (int l = 0; l < pass_.num_labels; ++l) {
        const auto q = static_cast<double>(q_[i * width() + l]);
        sums.negative_entropy += q == 0.0 ? 0.0 : q * std::log(q);
      }
    }
    load_unary(block);
    sums.unary -= against_logits();
    std::memset(logits_, 0, static_cast<size_t>(block.count * width()) * sizeof(T));
    add_messages(block);
    sums.pairwise -= against_logits();
  }

  const PointPass<T>& pass_;
  const int64_t band_;
  const Band points_;
  const int64_t kept_;  // points whose Q is kept
  bool takes_self_ = false;
  Buffer rows_;
  T* q_;         // [kBlock, width], the current block's
  T* logits_;    // [kBlock, width]
  T* filtered_;  // [width]
};

template <class T, int Piece, int Width>
void run_bands(const PointPass<T>& pass, ParallelFor parallel_for) {
  const int64_t bands = BandGrid(pass.grid).count();
  parallel_tasks(parallel_for, bands, [&](int64_t b) {
    BandPass<T, Piece, Width> band(pass, b);
    pass.overflow[b] = !band.run();
  });
}

template <class T>
void point_pass_cpu(const PointPass<T>& pass, ParallelFor parallel_for) {
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

extern const MeanFieldTable<float> kMeanFieldTable;
const MeanFieldTable<float> kMeanFieldTable = {point_pass_cpu<float>};
extern const MeanFieldTable<double> kMeanFieldTable64;
const MeanFieldTable<double> kMeanFieldTable64 = {point_pass_cpu<double>};

}  // namespace pydense::PYDENSE_ISA
