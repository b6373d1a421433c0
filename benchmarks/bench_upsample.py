# SPDX-License-Identifier: Apache-2.0
"""Upsampling on the CPU: pydense beside every form that torch offers.

    python -m benchmarks.bench_upsample                    # writes results/upsample.json
    python -m benchmarks.bench_upsample --isa avx512 avx2  # a process per instruction set
    python -m benchmarks.bench_upsample --quick            # seconds; writes nothing

Forward and backward through autograd. Judged is pydense on contiguous tensors; the same on
channels_last tensors stands beside it.
"""

from __future__ import annotations

from benchmarks._driver import Benchmark
from benchmarks._upsample_cases import case_of, problems, quick_problems

BENCHMARK = Benchmark(
    name="upsample",
    title="Bilinear upsampling on the CPU, forward and backward: pydense.ops on contiguous tensors",
    cases=lambda quick: [case_of(p) for p in (quick_problems() if quick else problems())],
    memoryless=("torch.compile",),  # a fresh process would measure its compiler
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    BENCHMARK.main()
