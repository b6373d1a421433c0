// SPDX-License-Identifier: Apache-2.0
// Units that are compiled once per instruction set define PYDENSE_ISA on the command line
// (baseline, avx2, avx512, avx512_bf16, amx, generic). Every helper such a unit includes lives in
// namespace pydense::PYDENSE_ISA: two units that instantiate one inline function with different
// flags would otherwise leave the linker to pick either copy, also for a CPU that cannot run it.
#pragma once

#ifndef PYDENSE_ISA
#define PYDENSE_ISA portable
#endif
