# SPDX-License-Identifier: Apache-2.0
"""RefineNet on ResNet-50, 101 and 152.

Source: G. Lin et al., *RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic
Segmentation*, CVPR 2017 (code: refinenet in MATLAB; refinenet-pytorch, whose names the parameters
have).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from pydense.nn import ChainedResidualPooling, ResidualConvUnit
from pydense.nn.atrous_conv import convolution
from pydense.ops import _crf_arguments as check

from ._base import SegmentationModel
from ._narrow import bicubic
from ._registry import register_model
from ._resnet import CHANNELS, ResNet


class RefineNet(SegmentationModel):
    """RefineNet: four paths from the coarsest map of a ResNet to the finest.

    Each path adapts its map by residual units, adds what the coarser path made, pools in a chain
    of residuals and refines by residual units. Input of the PyTorch checkpoints: RGB, ImageNet mean
    and standard deviation; of the MATLAB ones: RGB minus 128.

    Args:
        num_classes: Number of logits for each pixel.
        depth: Of the ResNet: 50, 101 or 152.
        variant: Of the chained residual pooling: ``"pool_conv"``, the paper; ``"conv_pool"``, the
            authors' improved one (their models for NYUDv2, Person-Part, Context, SUN-RGBD, ADE20K).
        upsampling: Between the paths: ``"bilinear"``; ``"bicubic"``, the kernel of MATLAB's
            imresize, half-pixel centred. (The MATLAB code's gradient of it is a scaled
            downsampling; here it is exact.)
        align_corners: Of the bilinear upsampling between the paths; True in the PyTorch ports.
        output_align_corners: Of the upsampling of the logits.
        dropout: Of the two coarsest maps and of what the classifier sees.
        channels: Of the coarsest path and of the others.
        stride_on: Where a block of the ResNet has its stride: the ``"3x3"`` or the first ``"1x1"``.
        frozen_norm: Batch normalisation keeps its statistics in training, as the authors' did. Give
            False to train a trunk that starts at random.
        norm_momentum: Of batch normalisation, where it is not frozen.
        features_only: Make the refined maps only.
        reference: Build the twin in plain torch.
    """

    _head = ("clf_conv",)

    def __init__(
        self,
        num_classes: int,
        depth: int = 101,
        *,
        variant: str = "pool_conv",
        upsampling: str = "bilinear",
        align_corners: bool = True,
        output_align_corners: bool = False,
        dropout: float = 0.5,
        channels: tuple[int, int] = (512, 256),
        stride_on: str = "3x3",
        frozen_norm: bool = True,
        norm_momentum: float = 0.1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        self._set_options(upsampling, align_corners, output_align_corners)
        adopt_resnet(self, depth, stride_on)
        self.do = nn.Dropout(dropout)
        self._add_paths(channels, 3, variant, units=(2, 3))
        self._finish(reference, frozen_norm, norm_momentum)

    def _set_options(
        self, upsampling: str, align_corners: bool, output_align_corners: bool
    ) -> None:
        op = type(self).__name__
        check.choice(op, "upsampling", upsampling, ("bilinear", "bicubic"))
        check.flag(op, "align_corners", align_corners)
        check.flag(op, "output_align_corners", output_align_corners)
        self.upsampling, self.path_align_corners = upsampling, align_corners
        self.align_corners = output_align_corners

    def _add_paths(
        self, channels: tuple[int, int], kernel_size: int, variant: str, units: tuple[int, int]
    ) -> None:
        """What lies between the ResNet and the logits, 1 being the coarsest path."""

        def conv(inputs: int, outputs: int, size: int = kernel_size) -> nn.Conv2d:
            return convolution(inputs, outputs, size)

        inputs = list(reversed(CHANNELS.values()))
        for k in (1, 2, 3, 4):
            own = channels[0] if k == 1 else channels[1]
            self.add_module(f"p_ims1d2_outl{k}_dimred", conv(inputs[k - 1], own))
            if units[0]:
                unit = ResidualConvUnit(own, units[0])
                self.add_module(f"adapt_stage{k}_b", nn.Sequential(unit))
            if k > 1:
                self.add_module(f"adapt_stage{k}_b2_joint_varout_dimred", conv(own, own))
            pool = ChainedResidualPooling(own, 4, kernel_size, variant)
            self.add_module(f"mflow_conv_g{k}_pool", nn.Sequential(pool))
            if units[1]:
                unit = ResidualConvUnit(own, units[1])
                self.add_module(f"mflow_conv_g{k}_b", nn.Sequential(unit))
            if k < 4:
                narrow = conv(own, channels[1])
                self.add_module(f"mflow_conv_g{k}_b3_joint_varout_dimred", narrow)
        self.clf_conv = nn.Conv2d(channels[1], self.num_classes, 3, padding=1)
        self.feature_channels = {str(i): channels[1] for i in range(4)}

    def _drop(self, x: Tensor) -> Tensor:
        out: Tensor = self.do(x)
        return out

    def _optional(self, name: str, x: Tensor) -> Tensor:
        """Through a layer that light-weight networks do not have."""
        layer = self._modules.get(name)
        return x if layer is None else layer(x)

    def _add(self, x: Tensor, coarse: Tensor) -> Tensor:
        """The ReLU of the sum with a coarser map."""
        size = (x.shape[2], x.shape[3])
        if self.upsampling == "bicubic":
            return (x + bicubic(coarse, size)).relu()
        out: Tensor = self.operators.fuse_sum_upsample(
            [x, coarse], size, relu=True, align_corners=self.path_align_corners
        )
        return out

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Refined maps ``"0"`` (a quarter of the input) to ``"3"`` (1/32), of equal channels."""
        return self.refine(self.trunk(x))

    def trunk(self, x: Tensor) -> list[Tensor]:
        """The maps of the ResNet: (N, 256, ceil(H / 4), ceil(W / 4)) to (N, 2048, ...) at 1/32."""
        return list(ResNet.forward(cast(Any, self), x).values())

    def refine(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """What :meth:`features` makes of the four maps of :meth:`trunk`."""
        maps = [*maps[:2], *(self._drop(y) for y in maps[2:])]
        refined: list[Tensor] = []
        for k in (1, 2, 3, 4):
            layer: Any = getattr(self, f"p_ims1d2_outl{k}_dimred")
            y = self._optional(f"adapt_stage{k}_b", layer(maps[4 - k]))
            if k == 1:
                y = y.relu()
            else:
                layer = getattr(self, f"adapt_stage{k}_b2_joint_varout_dimred")
                y = self._add(layer(y), refined[-1])
            y = getattr(self, f"mflow_conv_g{k}_pool")(y)
            y = self._optional(f"mflow_conv_g{k}_b", y)
            refined.append(self._optional(f"mflow_conv_g{k}_b3_joint_varout_dimred", y))
        return OrderedDict((str(i), y) for i, y in enumerate(reversed(refined)))

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        out: Tensor = self.clf_conv(self._drop(self.features(x)["0"]))
        return out


def adopt_resnet(model: nn.Module, depth: int, stride_on: str) -> None:
    """The children of a ResNet as those of the model: checkpoints have them at the top."""
    trunk = ResNet(depth, stride_on=stride_on)
    for name, child in trunk.named_children():
        model.add_module(name, child)
    cast(Any, model).stem = trunk.stem


@register_model
def refinenet50(num_classes: int = 21, **options: Any) -> RefineNet:
    """RefineNet-50 as in the paper; options of :class:`RefineNet`."""
    return RefineNet(num_classes, 50, **options)


@register_model
def refinenet101(num_classes: int = 21, **options: Any) -> RefineNet:
    """RefineNet-101 as in the paper and in the checkpoints of refinenet-pytorch."""
    return RefineNet(num_classes, 101, **options)


@register_model
def refinenet152(num_classes: int = 21, **options: Any) -> RefineNet:
    """RefineNet-152 as in the paper."""
    return RefineNet(num_classes, 152, **options)


@register_model
def refinenet50_improved(num_classes: int = 21, **options: Any) -> RefineNet:
    """RefineNet-50 with the authors' improved pooling: convolution, then pool."""
    return RefineNet(num_classes, 50, variant="conv_pool", **options)


@register_model
def refinenet101_improved(num_classes: int = 21, **options: Any) -> RefineNet:
    """RefineNet-101 with the authors' improved pooling: convolution, then pool."""
    return RefineNet(num_classes, 101, variant="conv_pool", **options)


@register_model
def refinenet152_improved(num_classes: int = 21, **options: Any) -> RefineNet:
    """RefineNet-152 with the authors' improved pooling: convolution, then pool."""
    return RefineNet(num_classes, 152, variant="conv_pool", **options)
