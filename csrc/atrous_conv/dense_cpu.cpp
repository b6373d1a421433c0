// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/dense_functions.h"

namespace pydense::PYDENSE_ISA {

extern const DenseConvTable kDenseConvTable;
const DenseConvTable kDenseConvTable = {{kDenseConvFunctions<float>, kDenseConvFunctions<double>,
                                         kDenseConvFunctions<BFloat16>, kDenseConvFunctions<Half>}};

}  // namespace pydense::PYDENSE_ISA
