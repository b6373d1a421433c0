# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation that does not change any more, as a factor and a shift of each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_fixed(norm: nn.Module) -> bool:
    """Whether it is a batch normalisation that takes its statistics from its buffers."""
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def factors(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a fixed one, with gradients to its weight and bias.

    In float32 for 16-bit parameters.
    """
    assert isinstance(norm, _BatchNorm)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = (variance.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -mean.to(dtype) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    return scale, shift


def folded(
    weight: Tensor, bias: Tensor | None, norm: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that is ``norm`` behind one, of their dtype."""
    if norm is None:
        return weight, bias
    scale, shift = factors(norm)
    if bias is not None:
        shift = shift + bias.to(scale.dtype) * scale
    matrix = weight.to(scale.dtype) * scale.view(-1, *[1] * (weight.dim() - 1))
    return matrix.to(weight.dtype), shift.to(weight.dtype)
