// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use. Chosen once, when first asked for;
// PYDENSE_CPU_CAPABILITY=<name> overrides it.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

// PYDENSE_GENERIC: the generic kernels alone, on a CPU that has others (for the ThreadSanitizer).
#if defined(__x86_64__) && !defined(PYDENSE_GENERIC)
#define PYDENSE_X86_KERNELS
#endif

namespace pydense {

// In order: a CPU that has one has all before it. kBaseline is x86-64-v2 (SSE4.2), kAvx2 adds
// AVX2+FMA+F16C, kAvx512 F+BW+DQ+VL, kAvx512Bf16 AVX-512 BF16, kAmx AMX BF16. Other machines have
// kGeneric.
enum class CpuIsa { kGeneric, kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* cpu_isa_name(CpuIsa isa);

// What this machine can run, best last.
const std::vector<CpuIsa>& available_cpu_isas();

CpuIsa current_cpu_isa();

// Whether products of bfloat16 are made of pairs of it (gemm/gemm_bf16.h).
bool multiplies_bf16_pairs();

// Throws std::invalid_argument for a name that is unknown or not available here. Not to be called
// while kernels run.
void set_cpu_isa(const std::string& name);

// The kernel table of the best instruction set that is compiled in and allowed.
template <class Table>
struct IsaTable {
  CpuIsa isa;
  const Table* table;
};
template <class Table>
const Table& select_cpu_table(std::initializer_list<IsaTable<Table>> tables) {
  const CpuIsa current = current_cpu_isa();
  const Table* best = tables.begin()->table;
  for (const IsaTable<Table>& entry : tables) {
    if (entry.isa <= current) {
      best = entry.table;
    }
  }
  return *best;
}

}  // namespace pydense

// PYDENSE_DECLARE_CPU_TABLES(Table, kName) declares pydense::<isa>::kName for every instruction
// set, PYDENSE_CPU_TABLES(kName) lists them for select_cpu_table. PYDENSE_OF_PAIRS(dtype, own,
// usual) is avx512_bf16::own for bfloat16 where the CPU multiplies pairs of it, else `usual`.
#if defined(PYDENSE_X86_KERNELS)
#define PYDENSE_DECLARE_CPU_TABLES(Table, kName) \
  namespace baseline {                           \
  extern const Table kName;                      \
  }                                              \
  namespace avx2 {                               \
  extern const Table kName;                      \
  }                                              \
  namespace avx512 {                             \
  extern const Table kName;                      \
  }
#define PYDENSE_CPU_TABLES(kName)            \
  {                                          \
      {CpuIsa::kBaseline, &baseline::kName}, \
      {CpuIsa::kAvx2, &avx2::kName},         \
      {CpuIsa::kAvx512, &avx512::kName},     \
  }
#define PYDENSE_OF_PAIRS(dtype, own, usual) \
  ((dtype) == FloatType::kBFloat16 && multiplies_bf16_pairs() ? avx512_bf16::own : (usual))
#else
#define PYDENSE_DECLARE_CPU_TABLES(Table, kName) \
  namespace generic {                            \
  extern const Table kName;                      \
  }
#define PYDENSE_CPU_TABLES(kName)          \
  {                                        \
      {CpuIsa::kGeneric, &generic::kName}, \
  }
#define PYDENSE_OF_PAIRS(dtype, own, usual) (usual)
#endif
