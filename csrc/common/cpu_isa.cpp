// SPDX-License-Identifier: Apache-2.0
#include "common/cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <string_view>

#include "common/check.h"

#if defined(PYDENSE_X86_KERNELS)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pydense {
namespace {

#if defined(PYDENSE_X86_KERNELS)
// Older clang does not know "f16c" as a name for __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  constexpr unsigned kF16c = 1U << 29;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kF16c) != 0;
}

// The operating system must grant the 8 KB of tile registers to the process, once.
bool amx_permitted() {
#if defined(__linux__)
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  constexpr unsigned kAmxBf16 = 1U << 22;
  constexpr unsigned kAmxTile = 1U << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 ||
      (edx & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<CpuIsa> detect() {
#if defined(PYDENSE_X86_KERNELS)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) {
    throw std::runtime_error("pydense: needs an x86-64-v2 CPU (SSE4.2, POPCNT)");
  }
  std::vector<CpuIsa> isas = {CpuIsa::kBaseline};
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) {
    return isas;
  }
  isas.push_back(CpuIsa::kAvx2);
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return isas;
  }
  isas.push_back(CpuIsa::kAvx512);
  if (!__builtin_cpu_supports("avx512bf16")) {
    return isas;
  }
  isas.push_back(CpuIsa::kAvx512Bf16);
  if (amx_permitted()) {
    isas.push_back(CpuIsa::kAmx);
  }
  return isas;
#else
  return {CpuIsa::kGeneric};
#endif
}

CpuIsa find(const std::string& name, const char* setting) {
  std::string known;
  for (const CpuIsa isa : available_cpu_isas()) {
    if (name == cpu_isa_name(isa)) {
      return isa;
    }
    known += known.empty() ? "" : ", ";
    known += cpu_isa_name(isa);
  }
  throw_invalid_argument(setting, " must be one of ", known, " on this machine, got '", name, "'");
}

std::atomic<CpuIsa>& current() {
  static std::atomic<CpuIsa> isa = [] {
    const char* wanted = std::getenv("PYDENSE_CPU_CAPABILITY");  // NOLINT(concurrency-mt-unsafe)
    return wanted == nullptr || *wanted == '\0' ? available_cpu_isas().back()
                                                : find(wanted, "PYDENSE_CPU_CAPABILITY");
  }();
  return isa;
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kBaseline:
      return "baseline";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
    case CpuIsa::kAmx:
      return "amx";
    case CpuIsa::kGeneric:
      break;
  }
  return "generic";
}

const std::vector<CpuIsa>& available_cpu_isas() {
  static const std::vector<CpuIsa> isas = detect();
  return isas;
}

CpuIsa current_cpu_isa() { return current(); }

bool multiplies_bf16_pairs() { return current_cpu_isa() >= CpuIsa::kAvx512Bf16; }

void set_cpu_isa(const std::string& name) { current() = find(name, "set_cpu_capability: name"); }

}  // namespace pydense
