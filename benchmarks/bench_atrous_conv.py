# SPDX-License-Identifier: Apache-2.0
"""Atrous convolution on the CPU: pydense beside every form that torch offers.

    python -m benchmarks.bench_atrous_conv                    # writes the result
    python -m benchmarks.bench_atrous_conv --isa avx512 avx2  # a process for each
    python -m benchmarks.bench_atrous_conv --quick            # seconds; writes nothing

DeepLab v2's classifier, a sum of four convolutions, and depthwise convolutions. Forward and
backward go through autograd. Judged is pydense on contiguous tensors; the same on channels_last
tensors stands beside it. With everything that has a backward stand the bytes that are kept for it.
"""

from __future__ import annotations

from typing import Any

from benchmarks._atrous_conv_cases import problems, quick_problems
from benchmarks._driver import Benchmark
from benchmarks._residual_pool_cases import add_figures, case_of


def complete(run: dict[str, Any]) -> None:
    """Adds the figures that no clock measures."""
    found = {p.name: p for p in (*problems(), *quick_problems())}
    add_figures(found[run["case"]], run)


BENCHMARK = Benchmark(
    name="atrous_conv",
    title="Atrous convolution on the CPU, forward and backward: pydense, contiguous tensors",
    cases=lambda quick: [case_of(p) for p in (quick_problems() if quick else problems())],
    complete=complete,
    memoryless=("torch.compile", "torch.compile channels_last"),  # it would measure the compiler
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    BENCHMARK.main()
