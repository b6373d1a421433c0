// SPDX-License-Identifier: Apache-2.0
// Mean-field inference of a dense CRF (Kraehenbuehl and Koltun, 2011):
//   Q_0 = softmax(x),   Q_{t+1} = softmax(x + sum_k C_k(K_k Q_t))
// with the logits x = -U, K_k a lattice's filter with its normalisation, and C_k the compatibility
// of labels, where positive values attract.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "dense_crf/permutohedral.h"

namespace pydense {

// One value for all labels, one for each, or a matrix [L, L] row by row.
enum class Compatibility { kPotts, kDiagonal, kMatrix };

// An array [labels, points] in any memory order.
template <class T>
struct LabelArray {
  T* data;
  int64_t label_stride;
  int64_t point_stride;
};

// Where results go: probabilities or logits in q, or the best label of every point.
enum class MeanFieldOutput { kProbabilities, kLogits, kLabels };
template <class T>
struct MeanFieldResult {
  MeanFieldOutput kind;
  LabelArray<T> q;
  int64_t* labels;  // [points]
};

// Sums over all labels and points. The energy of the field is unary + pairwise / 2.
struct FreeEnergy {
  double negative_entropy;  // Q log Q
  double unary;             // U Q
  double pairwise;          // -Q C(K Q)
};

// One pairwise term as the kernels see it.
template <class T>
struct PairwiseView {
  LatticeView<T> lattice;
  T* rows;
  T scale;  // of what is sliced, with the Potts weight
  T self_scale;
  Compatibility compatibility;
  const T* compat;  // diagonal: [width]; matrix: [labels, width], column by column
};

// What a pass over the points does, in this order.
template <class T>
struct PointPass {
  const PairwiseView<T>* terms;
  int num_terms;
  PointGrid grid;
  int num_labels;
  int width;                      // of a row
  LabelArray<const T> unary;      // data null: zero
  bool energies;                  // the unary holds U, else -U
  T* unary_rows;                  // [points, labels] -U in the lattice's order, or null
  bool fill_unary_rows;           // from the unary, else they stand for it
  LabelArray<const T> q_in;       // an earlier Q, read where the pass needs one
  bool compute;                   // Q from the unary and the messages, else Q is q_in
  bool messages;                  // add the messages of the terms' rows
  const MeanFieldResult<T>* out;  // null: Q is not stored
  T* kept;                        // [pixels, width] Q for the backward pass, or null
  bool splat;                     // splat Q into the terms' rows
  FreeEnergy* free_energy;        // [bands] sums over q_in, or null
  BufferPool* workspace;
  bool* overflow;  // [bands] set when a distribution is not finite
};

template <class T>
struct MeanFieldTable {
  void (*point_pass)(const PointPass<T>&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(MeanFieldTable<float>, kMeanFieldTable)
PYDENSE_DECLARE_CPU_TABLES(MeanFieldTable<double>, kMeanFieldTable64)

// Derivatives of a result by everything it depends on. From G = dL/dQ_t follow
//   dZ = Q_t (G - <G, Q_t>), the derivative by the logits of step t, added up for the unary, and
//   dL/dQ_(t-1) = sum_k C_k^T P_k with P_k = K_k^T dZ, dL/dC_k = sum over points of P_k Q_(t-1)^T.
template <class T>
struct MeanFieldGradient {
  int iterations;
  LabelArray<const T> grad;    // of the result: probabilities or logits
  LabelArray<const T> result;  // the probabilities; null where the result is logits
  const T* kept;               // Q_0 to Q_(iterations - 1), [iterations, pixels, row_values()]
  LabelArray<T> unary;         // dL/dunary
  LabelArray<T> q;             // dL/dQ_0 where the field started from a given one, else null
  T* steps;                    // dZ of steps 1 to iterations, in rows as `kept`, or null
  T* const* compats;           // [terms] dL/dcompat in the shape of the compatibility
};

template <class T>
class MeanField {
 public:
  MeanField(const PointGrid& grid, int num_labels, ParallelFor parallel_for);

  int64_t num_points() const { return grid_.points(); }
  int num_labels() const { return num_labels_; }

  // Until called, the unary energies are zero. The array has to outlive the field.
  void set_unary(LabelArray<const T> unary, bool energies);

  // compat: 1, L or L * L values by kind. The lattice's bytes have to outlive the field.
  void add_pairwise(const LatticeView<T>& lattice, Compatibility kind, const T* compat);

  // From `q` or, where its data is null, from softmax(x). `q` may be the result itself. `kept`,
  // where it is not null, gets Q_0 to Q_(iterations - 1) as rows [iterations, pixels,
  // row_values()].
  void run(int iterations, LabelArray<const T> q, const MeanFieldResult<T>& result,
           T* kept = nullptr);
  // Writes the same rows alone.
  void keep_distributions(int iterations, LabelArray<const T> q, T* kept);
  int row_values() const { return width_; }

  // Derivatives of `run`, from what it kept.
  void backward(const MeanFieldGradient<T>& gradient);
  FreeEnergy free_energy(LabelArray<const T> q);

 private:
  struct Term {
    Buffer compat;
    Buffer rows;  // made when first needed
  };

  void iterate(int last, LabelArray<const T> q, const MeanFieldResult<T>* result, T* kept,
               int num_kept);
  PointPass<T> pass();
  void run_pass(PointPass<T> pass);
  // Room for the unary point by point, which all passes but the first read faster than many planes;
  // none beside large lattices, which take longer and most of the memory.
  Buffer make_unary_rows(int passes) const;
  bool takes_self() const;
  void make_rows();
  void filter_terms(bool reverse);
  void filter_distribution(LabelArray<const T> q);  // leaves K Q in the terms' rows

  PointGrid grid_;
  int num_labels_;
  int width_;
  ParallelFor parallel_for_;
  LabelArray<const T> unary_{};
  bool energies_ = false;
  std::vector<Term> terms_;
  std::vector<PairwiseView<T>> views_;
  std::vector<LatticeRows<T>> rows_;
  BufferPool workspace_;
  std::mutex mutex_;  // the rows are workspace: one call at a time
};

}  // namespace pydense
