// SPDX-License-Identifier: Apache-2.0
// What the accurate and the fast exact filter have in common as operators.
#pragma once

#include "dense_crf/exact_filter.h"
#include "torch/picture.h"

namespace pydense {

// (N, C, P) values or (N, D, P) features, where there are kernels.
inline void check_points(const char* op, const char* name, const Tensor& x) {
  PYDENSE_CHECK(x.dim() == 3, op, ": ", name, " must have 3 dimensions, got ", x.dim());
  PYDENSE_CHECK(x.is_cpu() || x.is_cuda(), op, ": ", name,
                " must be on the CPU or a GPU (cuda), got another device");
}

// That both are of the same points. How many images the features have, check_exact_filter checks.
inline void check_points_fit(const char* op, const Tensor& values, const Tensor& features) {
  require_same_device(op, "features", features, values);
  require_dtype(op, "features", features, values.scalar_type());
  PYDENSE_CHECK(features.size(2) == values.size(2), op, ": features must have ", values.size(2),
                " points as the values have, got ", features.size(2));
}

template <class T>
ExactFilterArgs<T> exact_filter_args(const Tensor& values, const Tensor& features, bool self_term,
                                     Tensor& out) {
  ExactFilterArgs<T> args{features.const_data_ptr<T>(),
                          values.const_data_ptr<T>(),
                          out.mutable_data_ptr<T>(),
                          values.size(0),
                          features.size(0),
                          values.size(1),
                          values.size(2),
                          features.size(1),
                          {},
                          {},
                          self_term};
  for (int64_t axis = 0; axis < 3; ++axis) {
    args.feature_strides[axis] = features.stride(axis);
    args.value_strides[axis] = values.stride(axis);
  }
  return args;
}

}  // namespace pydense
