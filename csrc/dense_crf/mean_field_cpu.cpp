// SPDX-License-Identifier: Apache-2.0
// The pass over the points: slice all terms, add the unary, softmax, splat for the next iteration,
// all while a point's row is in the L1 cache.
#include <cmath>
#include <cstring>

#include "common/simd.h"
#include "dense_crf/lattice_rows.h"
#include "dense_crf/mean_field.h"

namespace pydense::PYDENSE_ISA {
namespace {

// A term's arrays from the first point of a band on.
struct BandTerm {
  const PairwiseView* view;
  const float* weights;
  const int32_t* entries;
  const int32_t* entry_vertex;
  const float* blurred;
  float* band_rows;
  int corners;
};

// Width is that of a row, or 0 where it is known at run time alone (rows of more than one piece).
template <int Piece, int Width>
class BandPass {
 public:
  BandPass(const PointPass& pass, int64_t band)
      : pass_(pass),
        terms_(pass.num_terms),
        row_(buffer_of<float>(static_cast<size_t>(pass.width) * (2 + terms_))),
        heap_terms_(buffer_of<BandTerm>(static_cast<size_t>(terms_))),
        band_terms_(heap_terms_.as<BandTerm>()) {
    for (int k = 0; k < terms_; ++k) {
      const PairwiseView& view = pass.terms[k];
      const LatticeView& lattice = view.rows.lattice;
      band_terms_[k] = {&view,
                        lattice.weights,
                        lattice.entries,
                        lattice.entry_vertex + lattice.band_entries[band],
                        view.rows.vertex_rows + blurred_rows_offset(lattice, pass.width),
                        view.rows.entry_rows + lattice.band_entries[band] * pass.width,
                        lattice.dims + 1};
      if (pass.splat) {
        const int64_t entries = lattice.band_entries[band + 1] - lattice.band_entries[band];
        std::memset(band_terms_[k].band_rows, 0,
                    static_cast<size_t>(entries * pass.width) * sizeof(float));
      }
    }
  }

  // False when a distribution is not finite.
  bool run(int64_t begin, int64_t end, double* divergence) {
    auto* q = row_.as<float>();
    float* const logits = q + width();
    bool finite = true;
    for (int64_t p = begin; p < end; ++p) {
      if (pass_.q_in.data == nullptr || pass_.divergence != nullptr) {
        energies(p, logits);
      }
      if (pass_.q_in.data != nullptr) {
        load_point(p, q);
      } else {
        finite = softmax(logits, q) && finite;
      }
      if (pass_.q_out.data != nullptr) {
        for (int l = 0; l < pass_.num_labels; ++l) {
          pass_.q_out.data[l * pass_.q_out.label_stride + p * pass_.q_out.point_stride] = q[l];
        }
      }
      if (pass_.splat) {
        splat(p, q);
      }
      if (pass_.divergence != nullptr) {
        *divergence += point_divergence(q, logits);
      }
    }
    return finite;
  }

 private:
  using PieceRow = Row<Piece>;

  PYDENSE_HD int width() const { return Width > 0 ? Width : pass_.width; }

  // -U minus the messages.
  PYDENSE_HD void energies(int64_t p, float* logits) const {
    const float* unary = pass_.negative_unary + p * width();
    float* const filtered = logits + width();  // [terms, width], for matrices
    for (int c = 0; c < width(); c += Piece) {
      PieceRow sum = PieceRow::load_from(unary + c);
      for (int k = 0; pass_.messages && k < terms_; ++k) {
        const BandTerm& term = band_terms_[k];
        const PieceRow message =
            slice_point<Piece>(term.weights + p * term.corners, term.entries + p * term.corners,
                               term.entry_vertex, term.corners, width(), term.blurred + c) *
            term.view->slice_norm[p];
        switch (term.view->compatibility) {
          case Compatibility::kPotts:
            sum = sum + message;
            break;
          case Compatibility::kDiagonal:
            sum = sum + message * PieceRow::load_from(term.view->compat + c);
            break;
          case Compatibility::kMatrix:
            message.store_to(filtered + int64_t{k} * width() + c);
            break;
        }
      }
      sum.store_to(logits + c);
    }
    for (int k = 0; pass_.messages && k < terms_; ++k) {
      if (band_terms_[k].view->compatibility == Compatibility::kMatrix) {
        multiply(band_terms_[k].view->compat, filtered + int64_t{k} * width(), logits);
      }
    }
  }

  PYDENSE_HD void multiply(const float* columns, const float* message, float* logits) const {
    for (int c = 0; c < width(); c += Piece) {
      PieceRow sum = PieceRow::load_from(logits + c);
      for (int l = 0; l < pass_.num_labels; ++l) {
        sum = sum + PieceRow::load_from(columns + int64_t{l} * width() + c) * message[l];
      }
      sum.store_to(logits + c);
    }
  }

  PYDENSE_HD bool softmax(const float* logits, float* q) const {
    constexpr int kLanes = PieceRow::kLanes;
    using Vec = typename PieceRow::Vec;
    Vec highest = load<Vec>(logits);
    for (int c = kLanes; c < width(); c += kLanes) {
      highest = max(highest, load<Vec>(logits + c));
    }
    const float top = lane_max<kLanes>(highest);
    Vec sums{};
    for (int c = 0; c < width(); c += Piece) {
      const PieceRow e = exp_of_difference(PieceRow::load_from(logits + c), top);
      for (const Vec& vec : e.v) {
        sums = sums + vec;
      }
      e.store_to(q + c);
    }
    const float sum = lane_sum<kLanes>(sums);
    const float inverse = 1.0f / sum;
    for (int c = 0; c < width(); c += Piece) {
      (PieceRow::load_from(q + c) * inverse).store_to(q + c);
    }
    // The largest term is e^0; a NaN or infinity anywhere breaks one of the two.
    return sum >= 1.0f && sum <= static_cast<float>(pass_.num_labels) * 1.001f;
  }

  // exp(row - top); the vectors of a row are independent, which hides the latency of the chain.
  static PYDENSE_HD PieceRow exp_of_difference(const PieceRow& row, float top) {
    PieceRow e;
    for (int i = 0; i < PieceRow::kVecs; ++i) {
      e.v[i] = exp_nonpositive<PieceRow::kLanes>(row.v[i] - top);
    }
    return e;
  }

  PYDENSE_HD void load_point(int64_t p, float* q) const {
    for (int l = 0; l < pass_.num_labels; ++l) {
      q[l] = pass_.q_in.data[l * pass_.q_in.label_stride + p * pass_.q_in.point_stride];
    }
    for (int l = pass_.num_labels; l < width(); ++l) {
      q[l] = 0.0f;
    }
  }

  PYDENSE_HD void splat(int64_t p, const float* q) const {
    for (int k = 0; k < terms_; ++k) {
      const BandTerm& term = band_terms_[k];
      const float norm = term.view->splat_norm == nullptr ? 1.0f : term.view->splat_norm[p];
      for (int c = 0; c < width(); c += Piece) {
        splat_point<Piece>(PieceRow::load_from(q + c) * norm, term.weights + p * term.corners,
                           term.entries + p * term.corners, term.corners, width(),
                           term.band_rows + c);
      }
    }
  }

  double point_divergence(const float* q, const float* logits) const {
    double sum = 0.0;
    for (int l = 0; l < pass_.num_labels; ++l) {
      if (q[l] > 0.0f) {
        sum += static_cast<double>(q[l]) *
               (std::log(static_cast<double>(q[l])) - static_cast<double>(logits[l]));
      }
    }
    return sum;
  }

  const PointPass& pass_;
  const int terms_;
  Buffer row_;  // q, logits, one message per term
  Buffer heap_terms_;
  BandTerm* band_terms_;
};

template <int Piece, int Width>
void run_bands(const PointPass& pass, ParallelFor parallel_for) {
  const int64_t bands = lattice_bands(pass.num_points);
  parallel_tasks(parallel_for, bands, [&](int64_t b) {
    BandPass<Piece, Width> band(pass, b);
    const bool finite =
        band.run(band_begin(pass.num_points, bands, b), band_begin(pass.num_points, bands, b + 1),
                 pass.divergence == nullptr ? nullptr : pass.divergence + b);
    pass.overflow[b] = !finite;
  });
}

void point_pass_cpu(const PointPass& pass, ParallelFor parallel_for) {
  with_piece<2>(pass.width, [&](auto piece) {
    constexpr int kPiece = decltype(piece)::value;
    if (pass.width == kPiece) {
      run_bands<kPiece, kPiece>(pass, parallel_for);
    } else {
      run_bands<kPiece, 0>(pass, parallel_for);
    }
  });
}

}  // namespace

extern const MeanFieldTable kMeanFieldTable;
const MeanFieldTable kMeanFieldTable = {point_pass_cpu};

}  // namespace pydense::PYDENSE_ISA
