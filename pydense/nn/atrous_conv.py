# SPDX-License-Identifier: Apache-2.0
"""Atrous convolution as a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pydense.ops._atrous_dispatch import LEAST_CHANNELS_GRADIENT
from pydense.ops.atrous_conv import convolve

from ._operators import UsesOperators
from ._packed_weight import PackedWeight


def convolution(
    inputs: int,
    outputs: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    *,
    padding: int | None = None,
    bias: bool = False,
) -> nn.Conv2d:
    """The layer for a convolution of a network, of pydense's kind where that may gain.

    That is an :class:`AtrousConv2d` where it is dilated, and where it is 3x3 with so many channels
    that the gradient of its weight (in bfloat16) or, with more of them, Winograd's algorithm (in
    float32) gains without dilation, too; elsewhere ``nn.Conv2d``, which does not stop to ask.

    Args:
        inputs: Channels.
        outputs: Channels of the result.
        kernel_size: Rows and columns.
        stride: Along both axes.
        dilation: Along both axes.
        padding: Left out, what keeps the size.
        bias: Whether it has one.
    """
    dilated = kernel_size > 1 and dilation > 1
    wide = kernel_size == 3 and stride == 1 and min(inputs, outputs) >= LEAST_CHANNELS_GRADIENT
    kind = AtrousConv2d if dilated or wide else nn.Conv2d
    if padding is None:
        padding = dilation * (kernel_size // 2)
    return kind(
        inputs,
        outputs,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=bias,
    )


class AtrousConv2d(UsesOperators, nn.Conv2d):
    """``nn.Conv2d`` over :func:`pydense.ops.atrous_conv2d`: the same arguments, parameters, keys.

    Padding other than with zeros is torch's. Without dilation it gains where 3x3 convolutions have
    many channels (on the CPU: Winograd's algorithm in float32; in bfloat16 the gradient of the
    weight). ``activation`` is None; it is ``"relu"`` where :func:`fold_batchnorm` made what follows
    a part of the layer. ``winograd_tile`` is as of the function, for speed at the expense of some
    precision.

    In eval mode and without gradients, a weight that pydense's dense kernels read is packed once
    and kept beside the parameter, until that changes (an optimizer's step counts, other writing
    through ``weight.data`` does not), the layer is called with gradients, its mode is set, or it
    moves; neither state_dict nor copies hold it.

    Example:
        >>> import torch
        >>> from pydense.nn import AtrousConv2d
        >>> layer = AtrousConv2d(8, 8, 3, padding=6, dilation=6, groups=8)
        >>> layer(torch.rand(1, 8, 17, 17)).shape
        torch.Size([1, 8, 17, 17])
    """

    activation: str | None = None
    winograd_tile: int | None = 2

    @classmethod
    def from_conv(cls, module: nn.Conv2d) -> AtrousConv2d:
        """A layer to take the place of ``module``, whose parameters, hooks and mode it shares.

        Raises:
            TypeError: Something else than an ``nn.Conv2d``; a subclass, which may compute something
                else, counts as such.
        """
        if type(module) is not nn.Conv2d:
            raise TypeError(
                f"AtrousConv2d: module must be an nn.Conv2d, got {type(module).__name__}"
            )
        layer = cls.__new__(cls)
        layer.__dict__.update(module.__dict__)
        return layer

    def extra_repr(self) -> str:
        """As of ``nn.Conv2d``, and the activation where there is one."""
        own = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{super().extra_repr()}{own}"  # type: ignore[no-untyped-call]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            padded: Tensor = super()._conv_forward(input, weight, bias)
            return padded.relu() if self.activation == "relu" else padded
        if self.plain:
            result: Tensor = self.operators.atrous_conv2d(
                input,
                weight,
                bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                activation=self.activation,
            )
            return result
        x = input if input.dim() == 4 else input[None]
        out = convolve(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.activation,
            self.winograd_tile,
            self.weight_cache(),
        )
        return out if input.dim() == 4 else out[0]

    def weight_cache(self) -> PackedWeight | None:
        """Where the packed weight is kept; None in training."""
        if self.training:
            return None
        cache: PackedWeight | None = self.__dict__.get("_packed")
        if cache is None:
            cache = self.__dict__["_packed"] = PackedWeight()
        return cache

    def train(self, mode: bool = True) -> AtrousConv2d:
        """As of ``nn.Module``; forgets the packed weight."""
        self.__dict__.pop("_packed", None)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> AtrousConv2d:
        self.__dict__.pop("_packed", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
