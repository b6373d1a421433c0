# SPDX-License-Identifier: Apache-2.0
"""Atrous convolution in plain torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import conv2d


def atrous_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = "same",
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """See :func:`pydense.ops.atrous_conv2d`."""
    out = conv2d(x, weight, bias, stride, padding, dilation, groups)
    return out.relu() if activation == "relu" else out


def atrous_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    *,
    dilation: Any = 1,
    padding: Any = "same",
    inner_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """See :func:`pydense.ops.atrous_separable_conv2d`."""
    inner = atrous_conv2d(
        x,
        depthwise_weight,
        depthwise_bias,
        padding=padding,
        dilation=dilation,
        groups=x.shape[1],
        activation=inner_activation,
    )
    return atrous_conv2d(inner, pointwise_weight, pointwise_bias, activation=activation)
