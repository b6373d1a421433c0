// SPDX-License-Identifier: Apache-2.0
// A whole product by the micro-kernels of common/gemm, compiled for every instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/float_type.h"

namespace pydense {

// c[i][j] = sum over k of a[i][k] b[k][j] (added to what c holds: more), dense and row by row.
struct GemmProduct {
  int64_t rows;
  int64_t columns;
  int64_t depth;
  const void* a;  // S
  const void* b;  // S
  void* c;        // ComputeOf<S>
  bool packed;    // rows of a are packed in panels; else read where they lie
  bool more;
};

// By FloatType. `pairs`: bfloat16 is multiplied in pairs.
struct GemmProductTable {
  void (*run[4])(const GemmProduct&);
  bool pairs;
};
PYDENSE_DECLARE_CPU_TABLES(GemmProductTable, kGemmProductTable)
#if defined(PYDENSE_X86_KERNELS)
namespace avx512_bf16 {
extern const GemmProductTable kGemmProductTable;
}
#endif

}  // namespace pydense
