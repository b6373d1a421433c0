// SPDX-License-Identifier: Apache-2.0
// Mean-field inference of a dense CRF (Kraehenbuehl and Koltun, 2011):
//   Q_0 = softmax(-U),   Q_{t+1} = softmax(-U - sum_k compat_k(n_k K_k n_k' Q_t))
// with K_k a lattice filter that includes the point itself, and n_k, n_k' its normalisation.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "dense_crf/permutohedral.h"

namespace pydense {

enum class Normalization { kNone, kBefore, kAfter, kSymmetric };

// Label compatibility, by the signs of pydensecrf: a positive Potts weight attracts (it stands for
// the energy -w [l = l']), a positive diagonal or matrix entry repels.
enum class Compatibility { kPotts, kDiagonal, kMatrix };

// An array [labels, points] in any memory order.
template <class T>
struct LabelArray {
  T* data;
  int64_t label_stride;
  int64_t point_stride;
};

// One pairwise term as the kernels see it.
struct PairwiseView {
  LatticeView lattice;
  const float* slice_rows;  // blurred
  float* splat_rows;
  const float* splat_norm;  // [num_points], null for 1
  const float* slice_norm;  // [num_points] with alpha and the Potts weight folded in
  Compatibility compatibility;
  const float* compat;  // diagonal: [width]; matrix: [labels, width], column by column; negated
};

// What a pass over the points does, in this order.
struct PointPass {
  const PairwiseView* terms;
  int num_terms;
  int64_t num_points;
  int num_labels;
  int width;                     // of a row
  const float* negative_unary;   // [num_points, width], -inf in the padding
  LabelArray<const float> q_in;  // data null: Q is computed, else loaded
  LabelArray<float> q_out;       // data null: Q is not stored
  bool messages;                 // Q from the terms' rows, else from the unary alone
  bool splat;                    // splat Q into the terms' rows
  double* divergence;            // [bands] sums of KL terms of q_in, or null
  bool* overflow;                // [bands] set when a distribution is not finite
};

struct MeanFieldTable {
  void (*point_pass)(const PointPass&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(MeanFieldTable, kMeanFieldTable)

class MeanField {
 public:
  MeanField(int64_t num_points, int num_labels, ParallelFor parallel_for);

  int64_t num_points() const { return num_points_; }
  int num_labels() const { return num_labels_; }

  // Until called, the unary energies are zero.
  void set_unary(LabelArray<const float> unary);

  // compat: 1, num_labels or num_labels^2 values by kind; the matrix must be symmetric.
  void add_pairwise(std::shared_ptr<const Lattice> lattice, Compatibility kind, const float* compat,
                    Normalization normalization);

  void start(LabelArray<float> q);
  void step(LabelArray<float> q);  // in place
  void run(int iterations, LabelArray<float> q);
  // sum Q log Q + sum U Q + sum Q (compat K Q), without the 1/2 on the pairwise part.
  double kl_divergence(LabelArray<const float> q);

 private:
  struct Term {
    std::shared_ptr<const Lattice> lattice;
    Buffer splat_norm;
    Buffer slice_norm;
    Buffer compat;
    Buffer rows[2];  // two sides, the second made when needed
  };

  PointPass pass() const;
  void run_pass(PointPass pass);
  // Slices read the rows of one side while splats write those of the other.
  void use_sides(int slice, int splat);
  void filter_terms();
  bool fuse_iterations() const;
  // Q from the unary and, if asked for, the filtered rows.
  void update(LabelArray<float> q, bool messages);
  void filter_distribution(LabelArray<const float> q);  // leaves K Q in the terms' rows

  int64_t num_points_;
  int num_labels_;
  int width_;
  ParallelFor parallel_for_;
  Buffer negative_unary_;
  std::vector<Term> terms_;
  std::vector<PairwiseView> views_;
  std::vector<LatticeRows> rows_;
  std::mutex mutex_;  // the rows are workspace: one call at a time
};

}  // namespace pydense
