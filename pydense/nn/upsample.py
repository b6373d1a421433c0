# SPDX-License-Identifier: Apache-2.0
"""Caffe's bilinear Deconvolution + Crop as a layer that loads FCN's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from pydense.ops import _crf_arguments as check
from pydense.ops import _upsample_arguments as arguments
from pydense.ops.coord_map import Crop, Deconv
from pydense.ops.upsample import bilinear_filler

from ._operators import UsesOperators

_OP = "UpsampleCrop"
# Relative; fillers that compute in float32 are off by as much at the ends of large filters.
_TOLERANCE = 2e-5


class UpsampleCrop(UsesOperators, nn.Module):
    """Upsamples by a bilinear deconvolution and crops to the size of another map.

    Replaces ``nn.ConvTranspose2d(C, C, kernel_size, stride, padding, bias=False)`` with the fixed
    bilinear filter, followed by ``[:, :, offset:offset + H, offset:offset + W]``, in networks of
    the FCN family; see :func:`pydense.ops.upsample_crop` for the formula, dtypes and memory.

    The layer has no parameters and adds nothing to a ``state_dict``. Loading a ``state_dict`` made
    with ``nn.ConvTranspose2d`` works: ``weight`` (dense or grouped) is compared with the bilinear
    filter, as it is or rounded to 16 bits, and then dropped, since the layer computes just that. A
    weight that was trained away from it, weights between channels or a bias other than 0 are
    refused: the network then needs its ``nn.ConvTranspose2d``.

    Args:
        stride: Of the deconvolution; a number or (y, x), as are the next three.
        kernel_size: Of the deconvolution, 2 * stride or 2 * stride - 1.
        padding: Of the deconvolution.
        offset: Of the crop; see :func:`pydense.ops.crop_offset`.
        border: ``"zeros"`` as Caffe, or ``"clamp"``.

    Shape:
        - x: (N, C, H, W).
        - like: the map whose (height, width) the output gets, or that size.
        - output: (N, C, height, width).

    Raises:
        ValueError: In the constructor or the call, see :func:`pydense.ops.upsample_crop`.
        TypeError: In the constructor or the call, see :func:`pydense.ops.upsample_crop`.
        RuntimeError: From ``load_state_dict``, for a weight that is not the bilinear filter.

    Example:
        >>> import torch
        >>> from pydense.nn import UpsampleCrop
        >>> upscore = UpsampleCrop(stride=32, kernel_size=64, offset=19)
        >>> image, score = torch.randn(1, 3, 500, 375), torch.randn(1, 21, 16, 12)
        >>> upscore(score, image).shape
        torch.Size([1, 21, 500, 375])
    """

    def __init__(
        self,
        stride: int | Sequence[int],
        kernel_size: int | Sequence[int],
        padding: int | Sequence[int] = 0,
        offset: float | Fraction | Sequence[float | Fraction] = 0,
        border: str = "zeros",
    ) -> None:
        super().__init__()
        check.choice(_OP, "border", border, ("zeros", "clamp"))
        self.stride = arguments.pair(_OP, "stride", stride, 1)
        arguments.crop_shifts(_OP, self.stride, kernel_size, padding, offset)
        self.kernel_size = arguments.pair(_OP, "kernel_size", kernel_size, 1)
        self.padding = arguments.pair(_OP, "padding", padding, 0)
        self.offset = tuple(offset) if isinstance(offset, Sequence) else offset
        self.border = border

    @classmethod
    def from_conv_transpose(
        cls, layer: nn.ConvTranspose2d, offset: float | Fraction | Sequence[float | Fraction] = 0
    ) -> UpsampleCrop:
        """The layer that computes what ``layer`` and a crop at ``offset`` do.

        Raises:
            ValueError: ``layer`` is not a bilinear deconvolution; the text says why.
        """
        if layer.in_channels != layer.out_channels:
            raise ValueError(
                f"{_OP}: layer must keep the number of channels, "
                f"got {layer.in_channels} -> {layer.out_channels}"
            )
        for name, plain in (("dilation", 1), ("output_padding", 0)):
            if tuple(getattr(layer, name)) != (plain, plain):
                raise ValueError(
                    f"{_OP}: layer must have {name} {plain}, got {tuple(getattr(layer, name))}"
                )
        padding: Any = layer.padding
        made = cls(layer.stride, layer.kernel_size, padding, offset)
        reasons = made._differences("", {"weight": layer.weight, "bias": layer.bias})
        if reasons:
            raise ValueError(reasons[0])
        return made

    def forward(self, x: Tensor, like: Tensor | int | Sequence[int]) -> Tensor:
        """The crop; see the class for shapes."""
        size: Any = tuple(like.shape[-2:]) if isinstance(like, Tensor) else like
        out: Tensor = self.operators.upsample_crop(
            x,
            stride=self.stride,
            kernel_size=self.kernel_size,
            padding=self.padding,
            offset=self.offset,
            size=size,
            border=self.border,
        )
        return out

    def coordinate_layers(self) -> list[Deconv | Crop]:
        """The layer as :func:`pydense.ops.coordinate_map` sees it."""
        offset: Any = self.offset
        return [Deconv(self.kernel_size, self.stride, self.padding), Crop(offset)]

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        text = f"stride={self.stride}, kernel_size={self.kernel_size}, padding={self.padding}"
        return f"{text}, offset={self.offset}, border={self.border!r}"

    def _differences(self, prefix: str, tensors: dict[str, Tensor | None]) -> list[str]:
        """Why a deconvolution with these tensors is not what the layer computes."""
        weight, bias = tensors.get("weight"), tensors.get("bias")
        reasons = []
        if weight is not None and (reason := _not_bilinear(weight.detach(), self.kernel_size)):
            reasons.append(
                f"{_OP}: {prefix}weight must be the bilinear filter of size {self.kernel_size} on "
                f"the diagonal, got {reason}; keep nn.ConvTranspose2d for such a checkpoint"
            )
        if bias is not None and bias.is_meta:
            reasons.append(f"{_OP}: {prefix}bias must be 0, got a meta tensor without values")
        elif bias is not None and bool((bias != 0).any()):
            reasons.append(f"{_OP}: {prefix}bias must be 0, got a trained one")
        return reasons

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        error_msgs: list[str] = rest[-1]
        known = {
            name: state_dict[prefix + name]
            for name in ("weight", "bias")
            if prefix + name in state_dict
        }
        error_msgs.extend(self._differences(prefix, known))
        others = {
            key: value
            for key, value in state_dict.items()
            if key not in {prefix + name for name in known}
        }
        super()._load_from_state_dict(others, prefix, *rest)


def _not_bilinear(weight: Tensor, kernel_size: tuple[int, int]) -> str | None:
    """What is wrong with a weight (C, C / groups, rows, columns), or None."""
    if weight.dim() != 4 or tuple(weight.shape[2:]) != kernel_size:
        return f"shape {tuple(weight.shape)}"
    channels, per_group = weight.shape[:2]
    if per_group < 1 or channels % per_group:
        return f"shape {tuple(weight.shape)}"
    if not weight.is_floating_point():
        return f"dtype {weight.dtype}"
    if weight.is_meta:
        return "a meta tensor, which has no values to compare"
    own = torch.arange(channels, device=weight.device)
    diagonal = weight[own, own % per_group]
    if bool(weight.count_nonzero() != diagonal.count_nonzero()):  # NaN counts
        return "weights between different channels"
    diagonal = diagonal.double().cpu()
    tent = bilinear_filler(1, kernel_size, dtype=torch.float64)[0, 0]
    # Checkpoints may have gone through 16 bits, from float64 or from float32, and back.
    expected = [tent] + [
        wide.to(dtype).double()
        for wide in (tent, tent.float())
        for dtype in (torch.float16, torch.bfloat16)
    ]
    if any(bool(((diagonal - e).abs() <= _TOLERANCE * e).all()) for e in expected):
        return None
    worst = float((diagonal - tent).abs().max())
    return f"values that differ from it by up to {worst:.3g} (trained, or another filler)"
