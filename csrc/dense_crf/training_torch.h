// SPDX-License-Identifier: Apache-2.0
// What the operators of mean_field_gradient_torch.cpp refuse on every device.
#pragma once

#include "torch/picture.h"

namespace pydense {

inline void check_training(const char* op, const std::string& output, int64_t iterations,
                           bool from_q) {
  PYDENSE_CHECK(output == "probabilities" || output == "logits", op,
                ": output must be probabilities or logits, got '", output, "'");
  const int64_t least = from_q ? 1 : 0;
  PYDENSE_CHECK(iterations >= least && iterations <= INT32_MAX, op, ": iterations must be in [",
                least, ", 2^31), got ", iterations);
}

// Whether backward makes the marginals again; then it needs what they are made from.
inline bool check_recompute(const char* op, const Tensor& kept, int64_t iterations, bool has_unary,
                            bool has_q, bool from_q) {
  const bool recompute = iterations > 0 && kept.size(1) == 0;
  PYDENSE_CHECK(!recompute || (has_unary && has_q == from_q), op,
                ": unary and q must be given where the marginals were not kept");
  return recompute;
}

// `width`: values in a row of the marginals on this device.
inline void check_kept(const char* op, const Tensor& kept, const Tensor& grad, int64_t iterations,
                       int64_t width) {
  PYDENSE_CHECK(kept.dim() == 4 && kept.is_contiguous() && kept.size(0) == grad.size(0) &&
                    kept.size(1) == iterations && kept.size(2) == grad.size(2) * grad.size(3) &&
                    kept.size(3) == width,
                op, ": kept must come from dense_crf_mean_field_training");
}

inline void check_feature_gradient(const char* op, const Tensor& features, const Tensor& a,
                                   const std::string& mode) {
  PYDENSE_CHECK(mode == "filter" || mode == "lattice", op,
                ": mode must be filter or lattice, got '", mode, "'");
  require_dtype(op, "features", features, a.scalar_type());
  require_same_device(op, "features", features, a);
  PYDENSE_CHECK((features.size(0) == 1 || features.size(0) == a.size(0)) &&
                    features.size(2) == a.size(2) && features.size(3) == a.size(3),
                op, ": features must have 1 or ", a.size(0), " images of the size of a");
}

}  // namespace pydense
