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

// A term's arrays, the entries from the first one of a band on.
struct BandTerm {
  const PairwiseView* view;
  const float* weights;
  const int32_t* point_entries;
  const LatticeEntry* entries;
  int corners;
};

constexpr int kBlock = 16;  // points; a block's rows fit the L1 cache

// Width is that of a row, or 0 where it is known at run time alone (rows of more than one piece).
template <int Piece, int Width>
class BandPass {
 public:
  BandPass(const PointPass& pass, int64_t band)
      : pass_(pass),
        terms_(pass.num_terms),
        rows_(buffer_of<float>(static_cast<size_t>(pass.width) * (2 * kBlock + 1))),
        q_(rows_.as<float>()),
        logits_(q_ + int64_t{kBlock} * pass.width),
        filtered_(logits_ + int64_t{kBlock} * pass.width),
        heap_terms_(buffer_of<BandTerm>(static_cast<size_t>(terms_))),
        band_terms_(heap_terms_.as<BandTerm>()) {
    for (int k = 0; k < terms_; ++k) {
      const PairwiseView& view = pass.terms[k];
      const LatticeView& lattice = view.lattice;
      band_terms_[k] = {&view, lattice.weights, lattice.point_entries,
                        lattice.entries + lattice.band_entries[band], lattice.dims + 1};
      if (pass.splat) {
        clear_band({lattice, pass.width, view.splat_rows}, band);
      }
    }
  }

  // False when a distribution is not finite. Points go through the stages in blocks: one point's
  // chain of dependent operations is longer than what a core looks ahead, several points' are not.
  bool run(int64_t begin, int64_t end, double* divergence) {
    bool finite = true;
    for (int64_t p = begin; p < end; p += kBlock) {
      const auto count = static_cast<int>(end - p < kBlock ? end - p : kBlock);
      if (pass_.q_in.data == nullptr || pass_.divergence != nullptr) {
        energies(p, count);
      }
      if (pass_.q_in.data != nullptr) {
        for (int i = 0; i < count; ++i) {
          load_point(p + i, q_ + i * width());
        }
      } else {
        finite = softmax(count) && finite;
      }
      if (pass_.q_out.data != nullptr) {
        for (int i = 0; i < count; ++i) {
          store_point(p + i, q_ + i * width());
        }
      }
      if (pass_.splat) {
        for (int k = 0; k < terms_; ++k) {
          with_corners(band_terms_[k].corners, [&](auto corners) {
            splat<decltype(corners)::value>(band_terms_[k], p, count);
          });
        }
      }
      for (int i = 0; pass_.divergence != nullptr && i < count; ++i) {
        *divergence += point_divergence(q_ + i * width(), logits_ + i * width());
      }
    }
    return finite;
  }

 private:
  using PieceRow = Row<Piece>;

  PYDENSE_HD int64_t width() const { return Width > 0 ? Width : pass_.width; }

  // Calls fn(IntConstant<corners>{}) for the usual kernels: position (2-D, 3-D), position + RGB;
  // with 0 for others.
  template <class Fn>
  static PYDENSE_HD void with_corners(int corners, const Fn& fn) {
    switch (corners) {
      case 3:
        return fn(IntConstant<3>{});
      case 4:
        return fn(IntConstant<4>{});
      case 6:
        return fn(IntConstant<6>{});
      default:
        return fn(IntConstant<0>{});
    }
  }

  // logits = -U minus the messages.
  PYDENSE_HD void energies(int64_t p, int count) const {
    std::memcpy(logits_, pass_.negative_unary + p * width(),
                static_cast<size_t>(count * width()) * sizeof(float));
    for (int k = 0; pass_.messages && k < terms_; ++k) {
      with_corners(band_terms_[k].corners, [&](auto corners) {
        slice<decltype(corners)::value>(band_terms_[k], p, count);
      });
    }
  }

  template <int Corners>
  PYDENSE_HD void slice(const BandTerm& term, int64_t p, int count) const {
    const int corners = Corners > 0 ? Corners : term.corners;
    const PairwiseView& view = *term.view;
    for (int i = 0; i < count; ++i) {
      const float* weights = term.weights + (p + i) * corners;
      const int32_t* point_entries = term.point_entries + (p + i) * corners;
      float* logits = logits_ + i * width();
      for (int64_t c = 0; c < width(); c += Piece) {
        const PieceRow message = slice_point<Piece>(weights, point_entries, term.entries, corners,
                                                    width(), view.slice_rows + c) *
                                 view.slice_norm[p + i];
        const PieceRow sum = PieceRow::load_from(logits + c);
        switch (view.compatibility) {
          case Compatibility::kPotts:
            (sum + message).store_to(logits + c);
            break;
          case Compatibility::kDiagonal:
            (sum + message * PieceRow::load_from(view.compat + c)).store_to(logits + c);
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

  PYDENSE_HD void multiply(const float* columns, const float* message, float* logits) const {
    for (int64_t c = 0; c < width(); c += Piece) {
      PieceRow sum = PieceRow::load_from(logits + c);
      for (int l = 0; l < pass_.num_labels; ++l) {
        sum = sum + PieceRow::load_from(columns + l * width() + c) * message[l];
      }
      sum.store_to(logits + c);
    }
  }

  // q = softmax(logits) for the points of a block.
  PYDENSE_HD bool softmax(int count) const {
    // A chunk's sums are kept in halves where the native vectors are narrower; lane_sum adds the
    // two halves first in any case.
    constexpr int kChunk = PieceRow::kChunkLanes;
    constexpr int kLanes = kChunk > kNativeLanes ? kNativeLanes : kChunk;
    constexpr int kParts = kChunk / kLanes;
    static_assert(kParts <= 2);
    using Vec = FloatVec<kLanes>;
    float tops[kBlock];
    for (int i = 0; i < count; ++i) {
      const float* logits = logits_ + i * width();
      Vec highest = load<Vec>(logits);
      for (int64_t c = kLanes; c < width(); c += kLanes) {
        highest = max(highest, load<Vec>(logits + c));
      }
      tops[i] = lane_max<kLanes>(highest);
    }
    for (int i = 0; i < count; ++i) {
      for (int64_t c = 0; c < width(); c += Piece) {
        const PieceRow row = PieceRow::load_from(logits_ + i * width() + c);
        PieceRow::from([&](auto part) {
          return exp_nonpositive(part(row) - tops[i]);
        }).store_to(q_ + i * width() + c);
      }
    }
    float inverses[kBlock];
    bool finite = true;
    for (int i = 0; i < count; ++i) {
      const float* q = q_ + i * width();
      Vec sums[2] = {load<Vec>(q), load<Vec>(q + int64_t{kParts - 1} * kLanes)};
      for (int64_t c = kChunk; c < width(); c += kChunk) {
        for (int64_t part = 0; part < kParts; ++part) {
          sums[part] = sums[part] + load<Vec>(q + c + part * kLanes);
        }
      }
      const float sum = lane_sum<kLanes>(kParts == 2 ? sums[0] + sums[1] : sums[0]);
      inverses[i] = 1.0f / sum;
      // The largest term is e^0; a NaN or infinity anywhere breaks one of the two.
      finite = finite && sum >= 1.0f && sum <= static_cast<float>(pass_.num_labels) * 1.001f;
    }
    for (int i = 0; i < count; ++i) {
      for (int64_t c = 0; c < width(); c += Piece) {
        float* q = q_ + i * width() + c;
        (PieceRow::load_from(q) * inverses[i]).store_to(q);
      }
    }
    return finite;
  }

  PYDENSE_HD void load_point(int64_t p, float* q) const {
    const float* from = pass_.q_in.data + p * pass_.q_in.point_stride;
    if (pass_.q_in.label_stride == 1) {
      std::memcpy(q, from, static_cast<size_t>(pass_.num_labels) * sizeof(float));
    } else {
      for (int l = 0; l < pass_.num_labels; ++l) {
        q[l] = from[l * pass_.q_in.label_stride];
      }
    }
    for (int64_t l = pass_.num_labels; l < width(); ++l) {
      q[l] = 0.0f;
    }
  }

  void store_point(int64_t p, const float* q) const {
    float* to = pass_.q_out.data + p * pass_.q_out.point_stride;
    if (pass_.q_out.label_stride == 1) {
      std::memcpy(to, q, static_cast<size_t>(pass_.num_labels) * sizeof(float));
    } else {
      for (int l = 0; l < pass_.num_labels; ++l) {
        to[l * pass_.q_out.label_stride] = q[l];
      }
    }
  }

  template <int Corners>
  PYDENSE_HD void splat(const BandTerm& term, int64_t p, int count) const {
    const int corners = Corners > 0 ? Corners : term.corners;
    for (int i = 0; i < count; ++i) {
      const float norm = term.view->splat_norm == nullptr ? 1.0f : term.view->splat_norm[p + i];
      for (int64_t c = 0; c < width(); c += Piece) {
        splat_point<Piece>(PieceRow::load_from(q_ + i * width() + c) * norm,
                           term.weights + (p + i) * corners, term.point_entries + (p + i) * corners,
                           term.entries, corners, width(), term.view->splat_rows + c);
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
  Buffer rows_;
  float* q_;         // [kBlock, width]
  float* logits_;    // [kBlock, width]
  float* filtered_;  // [width]
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
