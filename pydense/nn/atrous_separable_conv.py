# SPDX-License-Identifier: Apache-2.0
"""Depthwise-separable atrous convolution as a layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pydense.ops import _crf_arguments as check
from pydense.ops._atrous_plan import ACTIVATIONS
from pydense.ops.atrous_separable_conv import atrous_separable_conv2d, in_two_because

from ._batchnorm import folded, is_fixed
from ._hooks import has_hooks
from ._operators import UsesOperators
from .atrous_conv import AtrousConv2d

_Pair = int | Sequence[int]


class AtrousSeparableConv2d(UsesOperators, nn.Module):
    """A depthwise atrous and a 1x1 convolution, with batch normalisation and ReLU where wanted.

    See :func:`pydense.ops.atrous_separable_conv2d`. Where batch normalisation takes its statistics
    from its buffers (``eval()``) and x is on the CPU, it becomes part of the weights, and all is
    one pass; on CUDA that is an experiment, for layers without batch normalisation. In training the
    layers run one after the other, and so they do where one of them has hooks (pruning and
    ``nn.utils.weight_norm`` are such).

    The layers are called ``depthwise``, ``depthwise_norm``, ``pointwise`` and ``pointwise_norm``;
    those that are not wanted do not exist. DeepLab v3+ has all of them, in most ports with
    ``inner_activation=None``.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        kernel_size: Of the depthwise convolution; one number or (y, x).
        dilation: Its rate.
        padding: Its padding, numbers, ``"same"`` or ``"valid"``.
        bias: Whether both convolutions have one.
        inner_norm: Whether batch normalisation stands behind the depthwise convolution.
        norm: Whether one stands behind the 1x1 convolution.
        inner_activation: None, or ``"relu"`` between the convolutions.
        activation: None, or ``"relu"`` of the result.

    Shape:
        - x: (N, in_channels, H, W).
        - output: (N, out_channels, H', W').

    Example:
        >>> import torch
        >>> from pydense.nn import AtrousSeparableConv2d
        >>> layer = AtrousSeparableConv2d(8, 4, dilation=6, norm=True, activation="relu").eval()
        >>> layer(torch.rand(1, 8, 17, 17)).shape
        torch.Size([1, 4, 17, 17])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair = 3,
        *,
        dilation: _Pair = 1,
        padding: _Pair | str = "same",
        bias: bool = False,
        inner_norm: bool = False,
        norm: bool = False,
        inner_activation: str | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        op = "AtrousSeparableConv2d"
        inputs = check.integer(op, "in_channels", in_channels, 1, 2**20)
        outputs = check.integer(op, "out_channels", out_channels, 1, 2**20)
        for name, value in (("bias", bias), ("inner_norm", inner_norm), ("norm", norm)):
            check.flag(op, name, value)
        for name, word in (("inner_activation", inner_activation), ("activation", activation)):
            check.choice(op, name, word, ACTIVATIONS)
        self.inner_activation = inner_activation
        self.activation = activation
        self.depthwise = AtrousConv2d(
            inputs,
            inputs,
            kernel_size,  # type: ignore[arg-type]
            padding=padding,  # type: ignore[arg-type]
            dilation=dilation,  # type: ignore[arg-type]
            groups=inputs,
            bias=bias,
        )
        self.depthwise_norm = nn.BatchNorm2d(inputs) if inner_norm else None
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=bias)
        self.pointwise_norm = nn.BatchNorm2d(outputs) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """The result, in one pass where nothing but fixed batch normalisation stands between."""
        norms = [self.depthwise_norm, self.pointwise_norm]
        fuses = not self.plain and self._fuses(x, norms)
        if fuses and not any(map(has_hooks, self.children())):
            inner, inner_bias = folded(self.depthwise.weight, self.depthwise.bias, norms[0])
            outer, outer_bias = folded(self.pointwise.weight, self.pointwise.bias, norms[1])
            return atrous_separable_conv2d(
                x,
                inner,
                outer,
                inner_bias,
                outer_bias,
                dilation=self.depthwise.dilation,
                padding=self.depthwise.padding,
                inner_activation=self.inner_activation,
                activation=self.activation,
            )
        x = _finish(self.depthwise(x), norms[0], self.inner_activation)
        return _finish(self.pointwise(x), norms[1], self.activation)

    def _fuses(self, x: Tensor, norms: Sequence[nn.Module | None]) -> bool:
        """Whether one pass is possible, and on CUDA faster."""
        if x.device.type == "cpu":
            return all(norm is None or is_fixed(norm) for norm in norms)
        if x.device.type != "cuda" or any(norm is not None for norm in norms):
            return False
        first, second = self.depthwise, self.pointwise
        return x.dim() == 4 and (
            in_two_because(x, first.weight, second.weight, first.bias, second.bias) is None
        )

    def extra_repr(self) -> str:
        """The activations."""
        return f"inner_activation={self.inner_activation!r}, activation={self.activation!r}"


def _finish(x: Tensor, norm: nn.Module | None, activation: str | None) -> Tensor:
    if norm is not None:
        x = norm(x)
    return x.relu() if activation == "relu" else x
