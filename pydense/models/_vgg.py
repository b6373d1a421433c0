# SPDX-License-Identifier: Apache-2.0
"""VGG16's convolutions, under the names that they have in Caffe's networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pydense.nn._operators import UsesOperators
from pydense.nn.atrous_conv import convolution

CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)


class MaxPoolSame(UsesOperators, nn.Module):
    """Max pooling of stride 1 that keeps the size, see :func:`pydense.ops.max_pool2d_same`."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """The largest value of each window."""
        out: Tensor = self.operators.max_pool2d_same(x, self.kernel_size)
        return out


def add_convolutions(
    module: nn.Module, padding: int = 1, dilations: Sequence[int] = (1, 1, 1, 1, 1)
) -> None:
    """Gives a module the children ``conv1_1`` to ``conv5_3``.

    Args:
        module: Any.
        padding: Of ``conv1_1``; 100 in FCN.
        dilations: Of the five stages.
    """
    inputs = 3
    for stage, (outputs, count) in enumerate(zip(CHANNELS, CONVOLUTIONS, strict=True)):
        rate = dilations[stage]
        for index in range(count):
            first = stage == index == 0
            margin = padding if first else rate
            conv = convolution(inputs, outputs, 3, dilation=rate, padding=margin, bias=True)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            module.add_module(f"conv{stage + 1}_{index + 1}", conv)
            inputs = outputs


def run_stage(module: nn.Module, stage: int, x: Tensor) -> Tensor:
    """The convolutions of a stage (1 to 5), each with its ReLU."""
    for index in range(CONVOLUTIONS[stage - 1]):
        x = getattr(module, f"conv{stage}_{index + 1}")(x).relu_()
    return x
