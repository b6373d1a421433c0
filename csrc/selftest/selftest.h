// SPDX-License-Identifier: Apache-2.0
// selftest: y = 2 x + 1 in one pass. The smallest operator that goes every way a real one goes:
// CPU table per instruction set, CUDA kernel on the current stream, checks and errors.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace pydense {

struct SelftestArgs {
  const float* x;  // [n]
  float* y;        // [n]
  int64_t n;
};

struct SelftestTable {
  void (*run)(const SelftestArgs&, ParallelFor);
  const char* isa;  // the instruction set the table was compiled for
};
PYDENSE_DECLARE_CPU_TABLES(SelftestTable, kSelftestTable)
#if defined(PYDENSE_X86_KERNELS)
namespace avx512_bf16 {
extern const SelftestTable kSelftestTable;
}
namespace amx {
extern const SelftestTable kSelftestTable;
}
#endif

const SelftestTable& selftest_table();
void selftest_cuda(const SelftestArgs& args, int device, void* stream);

}  // namespace pydense
