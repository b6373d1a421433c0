// SPDX-License-Identifier: Apache-2.0
// One step of the mean field's backward pass as the kernels see it: slice what the transposed
// filters brought, through the compatibilities and the softmax, splat for the step before.
#pragma once

#include "dense_crf/mean_field.h"

namespace pydense {

// Rows are [pixels, width].
template <class T>
struct GradientPass {
  const PairwiseView<T>* terms;
  const T* const* transposed;  // [terms] of a matrix: [labels, width], row by row
  int num_terms;
  PointGrid grid;
  int num_labels;
  int width;
  LabelArray<const T> grad;  // dL/dQ or, for logits, dL/dZ; null: sum_k C_k^T P_k
  LabelArray<const T> q;     // Q, where `q_rows` is null
  const T* q_rows;
  bool softmax;       // from dL/dQ to dL/dZ = Q (dL/dQ - <dL/dQ, Q>)
  const T* later;     // rows of dL/dZ of the step behind, where a term has no self term
  T* step;            // rows that get dL/dZ, or null
  T* total;           // rows: the sum of all dL/dZ; null in a pass that is the only one
  bool first;         // nothing is in `total` yet
  LabelArray<T> out;  // last pass: gets total + dL/dZ, times sign
  T sign;
  LabelArray<T> q_out;  // gets dL/dQ, or null
  bool splat;
  // Sums over a band of P_k Q^T as the compatibility has it: 1 or `width` values, or a row of
  // `width` for each label.
  double* sums;              // [bands, band_sums]
  const int64_t* sum_begin;  // [terms] within a band
  int64_t band_sums;
  BufferPool* workspace;
};

template <class T>
struct MeanFieldGradientTable {
  void (*gradient_pass)(const GradientPass<T>&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(MeanFieldGradientTable<float>, kMeanFieldGradientTable)
PYDENSE_DECLARE_CPU_TABLES(MeanFieldGradientTable<double>, kMeanFieldGradientTable64)

}  // namespace pydense
