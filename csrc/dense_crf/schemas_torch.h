// SPDX-License-Identifier: Apache-2.0
// Operators that have kernels for both devices.
#pragma once

namespace pydense {

constexpr const char* kLatticeSchema =
    "dense_crf_lattice(Tensor features, str normalization, bool self_term) -> Tensor";
constexpr const char* kMeanFieldSchema =
    "dense_crf_mean_field(Tensor unary, Tensor[] lattices, Tensor[] compats, int iterations, "
    "bool energies, Tensor? q, str output) -> Tensor";
constexpr const char* kFilterSchema =
    "permutohedral_filter(Tensor values, Tensor lattice, bool reverse) -> Tensor";
constexpr const char* kTrainingSchema =
    "dense_crf_mean_field_training(Tensor unary, Tensor[] lattices, Tensor[] compats, "
    "Tensor[] features, int iterations, bool energies, Tensor? q, str output, "
    "str feature_gradient, bool recompute) -> (Tensor, Tensor)";
constexpr const char* kBackwardSchema =
    "dense_crf_mean_field_backward(Tensor grad, Tensor? unary, Tensor? result, Tensor kept, "
    "Tensor[] lattices, Tensor[] compats, int iterations, bool energies, Tensor? q, bool from_q, "
    "bool channels_last, bool keep) -> Tensor[]";
constexpr const char* kFeatureGradientSchema =
    "dense_crf_feature_gradient(Tensor features, Tensor lattice, Tensor a, Tensor b, "
    "Tensor? compat, str mode) -> Tensor";

}  // namespace pydense
