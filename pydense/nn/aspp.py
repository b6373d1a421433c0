# SPDX-License-Identifier: Apache-2.0
"""Atrous spatial pyramid pooling, with the parameter names of published PyTorch checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from pydense.ops import _crf_arguments as check
from pydense.ops.aspp import MAX_BRANCHES, MAX_RATE

from ._operators import UsesOperators

_MAX_CHANNELS = 2**20


class ASPPSum(UsesOperators, nn.Module):
    """DeepLab v2's classifier, the sum of 3x3 convolutions of several rates.

    See :func:`pydense.ops.aspp_sum`. The convolutions are called ``conv2d_list.0``, ...;
    checkpoints that call them ``c0``, ... load as well. Weights start from a normal distribution of
    deviation 0.01, biases from 0, as DeepLab's.

    Args:
        in_channels: Of the input; 2048 behind a ResNet.
        out_channels: Of the output, the number of classes.
        rates: Of the branches. DeepLab-ASPP-L has 6, 12, 18, 24.
        bias: Whether every branch has one.

    Shape:
        - x: (N, in_channels, H, W).
        - output: (N, out_channels, H, W).

    Example:
        >>> import torch
        >>> from pydense.nn import ASPPSum
        >>> head = ASPPSum(8, 3)
        >>> list(head.state_dict())[0], head(torch.rand(1, 8, 9, 9)).shape
        ('conv2d_list.0.weight', torch.Size([1, 3, 9, 9]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rates: Sequence[int] = (6, 12, 18, 24),
        bias: bool = True,
    ) -> None:
        super().__init__()
        op = "ASPPSum"
        inputs = check.integer(op, "in_channels", in_channels, 1, _MAX_CHANNELS)
        outputs = check.integer(op, "out_channels", out_channels, 1, _MAX_CHANNELS)
        row = check.sequence(op, "rates", rates, "integers")
        if not 1 <= len(row) <= MAX_BRANCHES:
            raise ValueError(f"{op}: rates must be 1 to {MAX_BRANCHES} integers, got {len(row)}")
        check.flag(op, "bias", bias)
        self.rates = [check.integer(op, f"rates[{i}]", r, 1, MAX_RATE) for i, r in enumerate(row)]
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate, bias=bias)
            for rate in self.rates
        )
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_rename)  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """DeepLab's initial values."""
        for layer in self._branches():
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def _branches(self) -> list[nn.Conv2d]:
        return [cast("nn.Conv2d", layer) for layer in self.conv2d_list]

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the branches."""
        weights = [layer.weight for layer in self._branches()]
        biases = [layer.bias for layer in self._branches() if layer.bias is not None]
        out: Tensor = self.operators.aspp_sum(x, weights, biases or None, rates=self.rates)
        return out


def _rename(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """``c0.weight`` is ``conv2d_list.0.weight``."""
    for i in range(len(module.rates)):
        for name in ("weight", "bias"):
            old = f"{prefix}c{i}.{name}"
            if old in state_dict:
                state_dict[f"{prefix}conv2d_list.{i}.{name}"] = state_dict.pop(old)
