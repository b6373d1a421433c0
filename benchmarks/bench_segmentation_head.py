# SPDX-License-Identifier: Apache-2.0
"""Segmentation heads on the CPU: upsampled argmax, cross-entropy and softmax beside torch.

    python -m benchmarks.bench_segmentation_head                    # writes a result
    python -m benchmarks.bench_segmentation_head --isa avx512 avx2  # a process per instruction set
    python -m benchmarks.bench_segmentation_head --quick            # seconds; writes nothing

:mod:`benchmarks._head_cases` lists the cases and the rivals.
"""

from __future__ import annotations

from benchmarks._driver import Benchmark
from benchmarks._head_cases import PROBLEMS, QUICK, case_of

BENCHMARK = Benchmark(
    name="segmentation_head",
    title=(
        "Segmentation heads on the CPU: bilinear upsampling with argmax, with cross-entropy "
        "(forward and backward) and with softmax"
    ),
    cases=lambda quick: [case_of(problem) for problem in (QUICK if quick else PROBLEMS)],
    rounds=7,
    memoryless=("torch.compile",),  # a fresh process would measure its compiler
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    BENCHMARK.main()
