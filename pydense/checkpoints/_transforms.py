# SPDX-License-Identifier: Apache-2.0
"""What is done to numbers between a file and a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._errors import CheckpointError, printable

_FOLDED = tuple(f"folded {name}" for name in ("weight", "bias", "mean", "var"))
HOW = ("copy", "flipped", "flat", "scaled", "channels", "pyramid", *_FOLDED)
"""``flipped``: of a transposed convolution of stride 1, a convolution with in- and outputs swapped
and the kernel turned; ``flat``: of a fully connected layer, a convolution over its whole input;
``scaled``: Caffe's batch normalisation holds sums, to be divided by blob 2; ``channels``: written
as (1, C, 1, 1); ``pyramid``: the second half of the input channels, in four parts, backwards;
``folded ...``: of a layer that scales and shifts alone, which is a batch normalisation with mean 0
and variance 1."""

_EPS = 1e-5  # of nn.BatchNorm2d


def usable(value: Tensor) -> bool:
    """Whether a tensor of a file holds its numbers: one expanded from a few could say any size."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def read(how: str, key: str, tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """A tensor of a file as the model has it; of another shape if it does not fit."""
    value = tensors[key]
    if how == "flipped" and value.dim() == 4:
        return value.transpose(0, 1).flip(2, 3)
    if how == "flat" and value.numel() == shape.numel() and value.shape[:1] == shape[:1]:
        return value.reshape(shape)
    if how == "scaled":
        value = _divided(key, value, tensors)
    if how == "pyramid":
        value = _turned(value)
    # Old Caffe gives every blob four dimensions, as (1, 1, 1, C) or (1, C, 1, 1).
    if value.dim() == 4 and len(shape) < 4 and _longer(value.shape) == _longer(shape):
        value = value.reshape(shape)
    if how == "folded mean":
        return torch.zeros(value.shape)
    if how == "folded var":
        return torch.full(value.shape, 1 - _EPS)
    return value


def write(
    how: str, key: str, value: Tensor, own: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Entries of a file, called ``key`` there, for a tensor of the model, ``own[name]``."""
    if how == "flipped":
        value = value.transpose(0, 1).flip(2, 3)
    elif how == "scaled":
        return {key: value, _factor(key): torch.ones(1)}
    elif how == "pyramid":
        value = _turned(value)
    elif how in ("folded mean", "folded var"):
        return {}  # they are in the other two
    elif how in _FOLDED:
        weight, bias, mean, var = (
            own[f"{name.rpartition('.')[0]}.{end}"].detach().double()
            for end in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (var + _EPS).sqrt()
        value = (scale if how == "folded weight" else bias - scale * mean).to(value.dtype)
    if how == "channels" or how in _FOLDED:
        value = value.reshape(1, -1, 1, 1)
    return {key: value}


def _longer(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _turned(value: Tensor) -> Tensor:
    if value.dim() != 4 or value.shape[1] % 8:
        return value
    half, parts = value.chunk(2, 1)
    return torch.cat((half, *reversed(parts.chunk(4, 1))), 1)


def used(how: str, key: str) -> tuple[str, ...]:
    """The entries of a file that a tensor of the model takes."""
    return (key, _factor(key)) if how == "scaled" else (key,)


def _factor(key: str) -> str:
    return key.rpartition(".")[0] + ".2"


def _divided(key: str, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    factor = tensors.get(_factor(key))
    if factor is None:
        return value
    if (
        not isinstance(factor, Tensor)
        or not usable(factor)
        or factor.is_complex()
        or factor.numel() != 1
    ):
        got = tuple(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
        raise CheckpointError(f"{printable(_factor(key))} must be one real number, got {got}")
    # 0 before any training step, as Caffe reads it.
    scale = float(factor)
    return value / scale if scale else torch.zeros_like(value)


def bilinear(channels: int, size: int, groups: int = 1) -> Tensor:
    """The bilinear filter of a deconvolution, (channels, channels / groups, size, size)."""
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    row = 1 - (torch.arange(size, dtype=torch.float64) - centre).abs() / factor
    weight = torch.zeros(channels, channels // groups, size, size, dtype=torch.float64)
    index = torch.arange(channels)
    weight[index, index % (channels // groups)] = row[:, None] * row
    return weight.float()
