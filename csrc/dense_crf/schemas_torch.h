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

}  // namespace pydense
