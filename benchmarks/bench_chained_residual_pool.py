# SPDX-License-Identifier: Apache-2.0
"""Chained residual pooling on the CPU: pydense beside every form that torch offers.

    python -m benchmarks.bench_chained_residual_pool                  # writes the result
    python -m benchmarks.bench_chained_residual_pool --quick          # seconds; writes nothing
    python -m benchmarks.bench_chained_residual_pool --isa avx512_bf16 avx2  # a process for each

Max pooling with stride 1, the pooling block of RefineNet in two sizes, and HRNet's head. Forward
and backward go through autograd. Judged is pydense on contiguous tensors; the same on channels_last
tensors stands beside it. With the light-weight block's inference stands its floor, matrix products
and pools alone, and with everything that has a backward the bytes that are kept for it.
"""

from __future__ import annotations

from benchmarks._autograd_cases import benchmark
from benchmarks._residual_pool_cases import problems, quick_problems

BENCHMARK = benchmark(
    "chained_residual_pool",
    "Chained residual pooling on the CPU, forward and backward: pydense, contiguous tensors",
    problems,
    quick_problems,
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    BENCHMARK.main()
