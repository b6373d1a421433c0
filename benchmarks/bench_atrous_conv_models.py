# SPDX-License-Identifier: Apache-2.0
"""What the dispatch rule makes of published networks' 3x3 convolutions, beside torch's forms.

    python -m benchmarks.bench_atrous_conv_models                    # writes the result
    python -m benchmarks.bench_atrous_conv_models --isa avx512 avx2  # a process for each
    python -m benchmarks.bench_atrous_conv_models --quick            # seconds; writes nothing

Where the rule takes torch's convolution, "pydense" is that of the same memory format: the ratio to
the other format is torch's own.
"""

from __future__ import annotations

from benchmarks._atrous_model_cases import problems, quick_problems
from benchmarks._autograd_cases import benchmark

BENCHMARK = benchmark(
    "atrous_conv_models",
    "3x3 convolutions of published networks on the CPU: pydense, contiguous tensors",
    problems,
    quick_problems,
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    BENCHMARK.main()
