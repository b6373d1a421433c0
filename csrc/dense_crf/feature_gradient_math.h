// SPDX-License-Identifier: Apache-2.0
// The end of the lattice's own derivative by the features, shared by CPU and CUDA.
#pragma once

#include "common/hd.h"

namespace pydense {

// From derivatives by the weights of a point's corners to those by its features: the weights are
// differences of the sorted coordinates, the coordinates are linear in the features.
template <class T, class I>
PYDENSE_HD void weights_to_features(const T* by_weight /* [d + 1], by remainder */,
                                    const I* rank /* [d + 1] */, const T* scale /* [d] */, int dims,
                                    T* work /* [d + 1] */, T* gradient /* [d] */) {
  const int n = dims + 1;
  for (int i = 0; i < n; ++i) {
    const auto j = static_cast<int>(rank[i]);
    work[i] = (by_weight[dims - j] - by_weight[(n - j) % n]) / static_cast<T>(n);
  }
  T before = work[0];
  for (int m = 1; m <= dims; ++m) {
    gradient[m - 1] = scale[m - 1] * (before - static_cast<T>(m) * work[m]);
    before = before + work[m];
  }
}

}  // namespace pydense
