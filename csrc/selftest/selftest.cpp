// SPDX-License-Identifier: Apache-2.0
#include "selftest/selftest.h"

namespace pydense {

const SelftestTable& selftest_table() {
#if defined(PYDENSE_X86_KERNELS)
  return select_cpu_table<SelftestTable>({{CpuIsa::kBaseline, &baseline::kSelftestTable},
                                          {CpuIsa::kAvx2, &avx2::kSelftestTable},
                                          {CpuIsa::kAvx512, &avx512::kSelftestTable},
                                          {CpuIsa::kAvx512Bf16, &avx512_bf16::kSelftestTable},
                                          {CpuIsa::kAmx, &amx::kSelftestTable}});
#else
  return select_cpu_table<SelftestTable>(PYDENSE_CPU_TABLES(kSelftestTable));
#endif
}

}  // namespace pydense
