// SPDX-License-Identifier: Apache-2.0
// Dense convolution in bfloat16, for CPUs that multiply pairs of it.
#include "atrous_conv/dense_functions.h"

namespace pydense::PYDENSE_ISA {

extern const DenseConvFunctions kDenseConvBFloat16;
const DenseConvFunctions kDenseConvBFloat16 = kDenseConvFunctions<BFloat16>;

}  // namespace pydense::PYDENSE_ISA
