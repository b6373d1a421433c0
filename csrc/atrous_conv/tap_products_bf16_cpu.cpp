// SPDX-License-Identifier: Apache-2.0
// The products in bfloat16, for CPUs that multiply pairs of it: nothing else gains from them.
#include "atrous_conv/tap_products_kernel.h"

namespace pydense::PYDENSE_ISA {

extern const TapProductFunctions kTapProductsBf16;
const TapProductFunctions kTapProductsBf16 = tap_product_functions<BFloat16>();

}  // namespace pydense::PYDENSE_ISA
