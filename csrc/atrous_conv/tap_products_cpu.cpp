// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/tap_products_kernel.h"

namespace pydense::PYDENSE_ISA {

extern const TapProductsTable kTapProductsTable;
const TapProductsTable kTapProductsTable = {
    {tap_product_functions<float>(), tap_product_functions<double>(),
     tap_product_functions<BFloat16>(), tap_product_functions<Half>()}};

}  // namespace pydense::PYDENSE_ISA
