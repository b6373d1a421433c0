// SPDX-License-Identifier: Apache-2.0
// The derivative of L = sum_c a_c^T K b_c by the features f that the lattice K was built from, K
// with its normalisation n(f).
//
// By filters: for a Gaussian kernel,
//   dL/df_i = sum_c a_i (K(b f) - f K b)_i + b_i (K^T(a f) - f K^T a)_i,
// and K is filtered with in the place of the Gaussian. The derivative of the lattice itself (of its
// barycentric weights, within the simplex that a point lies in) is what finite differences see, but
// far from that of the Gaussian: in five dimensions it is wrong in size, for bandwidths in sign.
#pragma once

#include "dense_crf/mean_field.h"

namespace pydense {

template <class T>
struct FeatureGradientArgs {
  const LatticeView<T>* lattice;
  const T* features;  // [dims, pixels] by strides
  int64_t dim_stride;
  int64_t point_stride;
  LabelArray<const T> a;
  LabelArray<const T> b;
  int channels;
  // Where it is not null, C^T a takes the place of a: 1, [channels] or [channels, channels] values.
  const T* compat;
  Compatibility kind;
  bool of_lattice;  // not for a lattice without its self term
  T* out;           // [dims, pixels]
};

template <class T>
void feature_gradient(const FeatureGradientArgs<T>& args, ParallelFor parallel_for);

template <class T>
struct FeatureGradientTable {
  void (*run)(const FeatureGradientArgs<T>&, ParallelFor);
};
PYDENSE_DECLARE_CPU_TABLES(FeatureGradientTable<float>, kFeatureGradientTable)
PYDENSE_DECLARE_CPU_TABLES(FeatureGradientTable<double>, kFeatureGradientTable64)

}  // namespace pydense
