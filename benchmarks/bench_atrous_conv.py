# SPDX-License-Identifier: Apache-2.0
"""Atrous convolution on the CPU: pydense beside every form that torch offers.

    python -m benchmarks.bench_atrous_conv                    # writes the result
    python -m benchmarks.bench_atrous_conv --isa avx512 avx2  # a process for each
    python -m benchmarks.bench_atrous_conv --quick            # seconds; writes nothing

DeepLab v2's classifier, a sum of four convolutions, depthwise and separable convolutions, the
branches of DeepLab v3, and its whole ResNet-101 where torchvision is installed. Forward and
backward go through autograd. Judged is pydense on contiguous tensors; the same on channels_last
tensors stands beside it. With everything that has a backward stand the bytes that are kept for it.
"""

from __future__ import annotations

from benchmarks._atrous_conv_cases import problems, quick_problems
from benchmarks._autograd_cases import benchmark

BENCHMARK = benchmark(
    "atrous_conv",
    "Atrous convolution on the CPU, forward and backward: pydense, contiguous tensors",
    problems,
    quick_problems,
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    BENCHMARK.main()
