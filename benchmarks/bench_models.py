# SPDX-License-Identifier: Apache-2.0
"""Whole segmentation models and heads, inference and training steps, beside their torch twins.

    python -m benchmarks.bench_models                     # writes the result; hours
    python -m benchmarks.bench_models --case inference    # the cases with this in their name
    python -m benchmarks.bench_models --quick             # minutes; writes nothing

:mod:`benchmarks._model_cases` lists the cases and says what the rivals are.
"""

from __future__ import annotations

from benchmarks._driver import Benchmark
from benchmarks._model_cases import COMPILED, case_of, missing, problems, quick_problems

BENCHMARK = Benchmark(
    name="models",
    title=(
        "Segmentation models on the CPU: pictures to labels, and training steps with the loss at "
        "full resolution; pydense, contiguous tensors"
    ),
    cases=lambda quick: [case_of(p) for p in (quick_problems() if quick else problems())],
    rounds=5,
    missing=missing,
    memoryless=COMPILED,  # a fresh process would measure the compiler
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    BENCHMARK.main()
