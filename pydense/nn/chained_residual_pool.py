# SPDX-License-Identifier: Apache-2.0
"""The blocks of RefineNet, with the parameter names of its published PyTorch checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from pydense.ops import _crf_arguments as check
from pydense.ops.chained_residual_pool import (
    MAX_STAGES,
    VARIANTS,
    window_size,
)

from ._operators import UsesOperators
from .atrous_conv import convolution

_MAX_CHANNELS = 2**20


def _channels(op: str, name: str, value: Any) -> int:
    return check.integer(op, name, value, 1, _MAX_CHANNELS)


def _kernel(op: str, value: Any) -> int:
    if check.integer(op, "kernel_size", value, 1, 3) == 2:
        raise ValueError(f"{op}: kernel_size must be 1 or 3, got 2")
    return int(value)


class ChainedResidualPooling(UsesOperators, nn.Module):
    """RefineNet's chained residual pooling; see :func:`pydense.ops.chained_residual_pool`.

    The convolutions are called ``1_outvar_dimred`` to ``{stages}_outvar_dimred``, as ``CRPBlock``
    of refinenet-pytorch and light-weight-refinenet has them, so that their checkpoints load.

    Args:
        channels: Of input and output.
        stages: 1 to 64; RefineNet has 2 or 4.
        kernel_size: Of the convolutions: 3 for RefineNet, 1 for Light-Weight RefineNet.
        variant: ``"pool_conv"``: the original, also of Light-Weight RefineNet; ``"conv_pool"``: the
            improved one.
        bias: RefineNet has none.
        pool_size: Odd, 3 to 13.

    Shape:
        - x: (N, channels, H, W). Networks apply a ReLU first.
        - output: as x.

    Example:
        >>> import torch
        >>> from pydense.nn import ChainedResidualPooling
        >>> block = ChainedResidualPooling(8, kernel_size=1)
        >>> list(block.state_dict())[0], block(torch.rand(1, 8, 9, 9)).shape
        ('1_outvar_dimred.weight', torch.Size([1, 8, 9, 9]))
    """

    def __init__(
        self,
        channels: int,
        stages: int = 4,
        kernel_size: int = 3,
        variant: str = "pool_conv",
        bias: bool = False,
        pool_size: int = 5,
    ) -> None:
        super().__init__()
        op = "ChainedResidualPooling"
        channels = _channels(op, "channels", channels)
        self.stages = check.integer(op, "stages", stages, 1, MAX_STAGES)
        self.kernel_size = _kernel(op, kernel_size)
        check.choice(op, "variant", variant, VARIANTS)
        check.flag(op, "bias", bias)
        self.variant = variant
        self.pool_size = window_size(op, "pool_size", pool_size)
        for i in range(self.stages):
            # Holds what the operator takes.
            layer = nn.Conv2d(
                channels, channels, self.kernel_size, padding=self.kernel_size // 2, bias=bias
            )
            self.add_module(f"{i + 1}_outvar_dimred", layer)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the input and all stages."""
        layers = [getattr(self, f"{i + 1}_outvar_dimred") for i in range(self.stages)]
        biases = [layer.bias for layer in layers]
        out: Tensor = self.operators.chained_residual_pool(
            x,
            [layer.weight for layer in layers],
            None if biases[0] is None else biases,
            variant=self.variant,
            pool_size=self.pool_size,
        )
        return out

    def extra_repr(self) -> str:
        """What the convolutions do not show."""
        return f"variant={self.variant!r}, pool_size={self.pool_size}"


class ResidualConvUnit(nn.Module):
    r"""RefineNet's residual convolution units, several in a row.

    .. math:: x \leftarrow x + w_2 * \mathrm{relu}(w_1 * \mathrm{relu}(x) + b_1)

    The skip carries x before the ReLU. The 3x3 convolutions are called ``1_conv`` (with bias) and
    ``1_conv_relu_varout_dimred`` (without), ``2_conv``, ..., as ``RCUBlock`` of refinenet-pytorch
    has them.

    Args:
        channels: Of input and output.
        units: How many; RefineNet has 2 before a fusion and 3 after a pooling block.

    Shape:
        - x: (N, channels, H, W).
        - output: as x.
    """

    def __init__(self, channels: int, units: int = 1) -> None:
        super().__init__()
        op = "ResidualConvUnit"
        channels = _channels(op, "channels", channels)
        self.units = check.integer(op, "units", units, 1, 1000)
        for i in range(self.units):
            self.add_module(f"{i + 1}_conv", convolution(channels, channels, 3, bias=True))
            self.add_module(f"{i + 1}_conv_relu_varout_dimred", convolution(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """The last unit's sum."""
        for i in range(self.units):
            inner = getattr(self, f"{i + 1}_conv")(x.relu()).relu_()
            x = x + getattr(self, f"{i + 1}_conv_relu_varout_dimred")(inner)
        return x


class MultiResolutionFusion(UsesOperators, nn.Module):
    """RefineNet's fusion: a convolution for each map, bilinear upsampling to the largest, a sum.

    Upsampling (``align_corners=True``, as in the PyTorch ports), sum and ReLU are one pass:
    :func:`pydense.ops.fuse_sum_upsample`.

    Args:
        in_channels: Of each map.
        out_channels: Left out, the smallest of ``in_channels``.
        kernel_size: Of the convolutions ``convs.0``, ...: 3, or 1 for Light-Weight RefineNet.
        relu: Apply the ReLU that RefineNet has behind the sum.

    Shape:
        - maps: (N, in_channels[k], H_k, W_k); one of them is at least as high and wide as all.
        - output: (N, out_channels, H, W) with the largest size.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int | None = None,
        kernel_size: int = 3,
        relu: bool = False,
    ) -> None:
        super().__init__()
        op = "MultiResolutionFusion"
        row = check.sequence(op, "in_channels", in_channels, "integers")
        counts = [_channels(op, "in_channels", c) for c in row]
        if not counts:
            raise ValueError(f"{op}: in_channels must not be empty, got {in_channels!r}")
        outputs = min(counts) if out_channels is None else out_channels
        outputs = _channels(op, "out_channels", outputs)
        check.flag(op, "relu", relu)
        self.relu = relu
        kernel_size = _kernel(op, kernel_size)
        self.convs = nn.ModuleList(convolution(c, outputs, kernel_size) for c in counts)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The sum at the largest size."""
        if len(maps) != len(self.convs):
            raise ValueError(
                f"MultiResolutionFusion: maps must be {len(self.convs)}, got {len(maps)}"
            )
        row = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        size = row[0].shape[2:]
        for x in row[1:]:
            if x.shape[2] > size[0] or x.shape[3] > size[1]:
                size = x.shape[2:]
        out: Tensor = self.operators.fuse_sum_upsample(
            row, tuple(size), relu=self.relu, align_corners=True
        )
        return out


class RefineNetBlock(nn.Module):
    """A block of RefineNet: residual units, fusion, ReLU, chained residual pooling, residual units.

    The first map is the new one of the backbone, the second what the coarser block made, if there
    is one: in the published networks the first alone has residual units of its own. Without them,
    and with ``kernel_size=1``, it is the block of Light-Weight RefineNet.

    Args:
        in_channels: Of each map.
        channels: Of the pooling block and the output; of the only map, if there is one alone.
        kernel_size: Of the fusion and of the pooling block.
        adapt_units: Residual units of the first map; 0 for Light-Weight RefineNet.
        output_units: Residual units at the end; 0 for Light-Weight RefineNet.
        stages: Of the pooling block.
        variant: Of the pooling block.

    Shape:
        - maps: (N, in_channels[k], H_k, W_k).
        - output: (N, channels, H, W) with the largest size.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        kernel_size: int = 3,
        adapt_units: int = 2,
        output_units: int = 3,
        stages: int = 4,
        variant: str = "pool_conv",
    ) -> None:
        super().__init__()
        op = "RefineNetBlock"
        row = check.sequence(op, "in_channels", in_channels, "integers")
        counts = [_channels(op, "in_channels", c) for c in row]
        if not counts or (len(counts) == 1 and counts[0] != channels):
            raise ValueError(
                f"{op}: in_channels must be several numbers or channels = {channels} alone, "
                f"got {in_channels!r}"
            )
        check.integer(op, "adapt_units", adapt_units, 0, 1000)
        check.integer(op, "output_units", output_units, 0, 1000)
        self.adapt = ResidualConvUnit(counts[0], adapt_units) if adapt_units else nn.Identity()
        self.fusion = (
            MultiResolutionFusion(counts, channels, kernel_size, relu=True)
            if len(counts) > 1
            else None
        )
        self.pool = ChainedResidualPooling(channels, stages, kernel_size, variant)
        self.output = ResidualConvUnit(channels, output_units) if output_units else nn.Identity()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The refined map."""
        row = [self.adapt(maps[0]), *maps[1:]]
        if self.fusion is not None:
            fused = self.fusion(row)
        elif len(row) == 1:
            fused = row[0].relu()
        else:
            raise ValueError(f"RefineNetBlock: maps must be 1, got {len(row)}")
        refined: Tensor = self.output(self.pool(fused))
        return refined

    def load_published(self, state_dict: Mapping[str, Any], stage: int) -> None:
        """Loads the block from a checkpoint of refinenet-pytorch or light-weight-refinenet.

        Args:
            state_dict: Of the whole network; keys of other parts are passed over.
            stage: 1 for the coarsest block to 4. The coarser block's ``_joint_varout_dimred``
                convolution is part of this one's fusion.

        Raises:
            RuntimeError: Keys that the block has and the checkpoint has not, or other shapes.
        """
        check.integer("RefineNetBlock", "stage", stage, 1, 4)
        names = {
            f"adapt_stage{stage}_b.": "adapt.",
            f"adapt_stage{stage}_b2_joint_varout_dimred.": "fusion.convs.0.",
            f"mflow_conv_g{stage - 1}_b3_joint_varout_dimred.": "fusion.convs.1.",
            f"mflow_conv_g{stage}_pool.": "pool.",
            f"mflow_conv_g{stage}_b.": "output.",
        }
        own = {
            new + key.removeprefix(old): value
            for key, value in state_dict.items()
            for old, new in names.items()
            if key.startswith(old)
        }
        self.load_state_dict(own)


class UpsampleConcatConv1x1(UsesOperators, nn.Module):
    r"""Upsample maps to one size, concatenate them, and convolve 1x1: convolved first.

    .. math:: w * \mathrm{cat}_k(U_k x_k) + b = \sum_k U_k (w_k * x_k) + b

    Bilinear upsampling keeps constants and acts on each channel alone, so it commutes with a 1x1
    convolution. The heads of HRNet and SegFormer convolve at full resolution what has a fraction of
    the pixels; here each map is convolved at its own, and the sum is one pass
    (:func:`pydense.ops.fuse_sum_upsample`). Equal up to rounding.

    ``weight`` and ``bias`` are those of the ``nn.Conv2d(sum(in_channels), out_channels, 1)`` that
    the layer takes the place of.

    Args:
        in_channels: Of each map, in the order of concatenation.
        out_channels: Of the output.
        bias: Whether there is one.
        align_corners: Of the upsampling.
        mode: ``"bilinear"`` or ``"nearest"``.

    Shape:
        - maps: (N, in_channels[k], H_k, W_k).
        - size: (height, width) of the output; that of the first map if left out.
        - output: (N, out_channels, height, width).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        bias: bool = True,
        align_corners: bool = False,
        mode: str = "bilinear",
    ) -> None:
        super().__init__()
        op = "UpsampleConcatConv1x1"
        row = check.sequence(op, "in_channels", in_channels, "integers")
        self.in_channels = [_channels(op, "in_channels", c) for c in row]
        if not 1 <= len(row) <= 16:
            raise ValueError(f"{op}: in_channels must be 1 to 16 numbers, got {in_channels!r}")
        outputs = _channels(op, "out_channels", out_channels)
        check.flag(op, "bias", bias)
        check.flag(op, "align_corners", align_corners)
        check.choice(op, "mode", mode, ("bilinear", "nearest"))
        self.align_corners, self.mode = align_corners, mode
        plain = nn.Conv2d(sum(self.in_channels), outputs, 1, bias=bias)  # its initial values
        self.weight = plain.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", cast("nn.Parameter | None", plain.bias))

    def forward(self, maps: Sequence[Tensor], size: int | Sequence[int] | None = None) -> Tensor:
        """The convolution of the concatenation."""
        op = "UpsampleConcatConv1x1"
        if [x.shape[1] for x in maps] != self.in_channels:
            raise ValueError(
                f"{op}: maps must have channels {self.in_channels}, "
                f"got {[x.shape[1] for x in maps]}"
            )
        wanted: Any = tuple(maps[0].shape[2:]) if size is None else size
        options: dict[str, Any] = {"align_corners": self.align_corners, "mode": self.mode}
        if self.plain:
            fuse = self.operators.fuse_sum_upsample
            whole = torch.cat([fuse([x], wanted, **options) for x in maps], 1)
            return conv2d(whole, self.weight, self.bias)
        weights = torch.split(self.weight, self.in_channels, dim=1)
        biases = [self.bias, *[None] * (len(maps) - 1)]
        row = [conv2d(x, w, b) for x, w, b in zip(maps, weights, biases, strict=True)]
        out: Tensor = self.operators.fuse_sum_upsample(row, wanted, **options)
        return out

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return (
            f"{self.in_channels}, {self.weight.shape[0]}, bias={self.bias is not None}, "
            f"align_corners={self.align_corners}, mode={self.mode!r}"
        )
