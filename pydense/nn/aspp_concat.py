# SPDX-License-Identifier: Apache-2.0
"""DeepLab v3's atrous spatial pyramid pooling, with torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pydense.ops import _crf_arguments as check
from pydense.ops.aspp import MAX_BRANCHES, MAX_RATE
from pydense.ops.aspp_concat import concat
from pydense.ops.atrous_conv import WeightCache

from ._batchnorm import factors, is_fixed
from ._hooks import has_hooks
from ._operators import UsesOperators
from .atrous_conv import AtrousConv2d

_MAX_CHANNELS = 2**20


class _Branch(NamedTuple):
    conv: nn.Conv2d
    norm: nn.Module


class ASPP(UsesOperators, nn.Module):
    """DeepLab v3's head: a 1x1 and several atrous convolutions and image pooling, then a 1x1 one.

    The parameters and keys are those of ``torchvision.models.segmentation.deeplabv3.ASPP``, and so
    is what it computes. Where batch normalisation takes its statistics from its buffers
    (``eval()``) and the map is on the CPU or CUDA, branches are :func:`pydense.ops.aspp_concat`
    with batch normalisation and ReLU at the end of each product; else the layers run one after the
    other, the convolutions as :class:`AtrousConv2d`. They do, too, where a layer has hooks or was
    replaced by one of another kind. In ``eval()`` it has no second derivatives: the operator
    raises; without gradients, its layers keep their weights packed (:class:`AtrousConv2d`).

    Args:
        in_channels: Of the input; 2048 behind a ResNet.
        atrous_rates: Of the 3x3 convolutions; DeepLab v3 has 6, 12, 18 with an output stride of 16
            and 12, 24, 36 with one of 8.
        out_channels: Of every branch and of the output.

    Shape:
        - x: (N, in_channels, H, W).
        - output: (N, out_channels, H, W).

    Example:
        >>> import torch
        >>> from pydense.nn import ASPP
        >>> head = ASPP(8, (6, 12, 18), 4).eval()
        >>> head(torch.rand(1, 8, 9, 9)).shape, [*head.state_dict()][-6]
        (torch.Size([1, 4, 9, 9]), 'project.0.weight')
    """

    def __init__(
        self, in_channels: int, atrous_rates: Sequence[int], out_channels: int = 256
    ) -> None:
        super().__init__()
        op = "ASPP"
        inputs = check.integer(op, "in_channels", in_channels, 1, _MAX_CHANNELS)
        outputs = check.integer(op, "out_channels", out_channels, 1, _MAX_CHANNELS)
        row = check.sequence(op, "atrous_rates", atrous_rates, "integers")
        if not 1 <= len(row) < MAX_BRANCHES:
            raise ValueError(
                f"{op}: atrous_rates must be 1 to {MAX_BRANCHES - 1} integers, got {len(row)}"
            )
        rates = [check.integer(op, f"atrous_rates[{i}]", r, 1, MAX_RATE) for i, r in enumerate(row)]

        def finished(*layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(*layers, nn.BatchNorm2d(outputs), nn.ReLU())

        self.convs = nn.ModuleList(
            [
                finished(nn.Conv2d(inputs, outputs, 1, bias=False)),
                *(
                    finished(AtrousConv2d(inputs, outputs, 3, padding=r, dilation=r, bias=False))
                    for r in rates
                ),
                finished(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, outputs, 1, bias=False)),
            ]
        )
        self.project = finished(nn.Conv2d((len(rates) + 2) * outputs, outputs, 1, bias=False))
        self.project.append(nn.Dropout(0.5))

    @classmethod
    def from_module(cls, module: nn.Module) -> ASPP:
        """A head to take the place of torchvision's, whose layers, hooks and mode it shares.

        Its dilated convolutions become :class:`AtrousConv2d`.

        Raises:
            TypeError: Something that is not built as torchvision's.
        """
        if not is_aspp(module):
            raise TypeError(
                f"ASPP: module must be built as torchvision's ASPP, got {type(module).__name__}"
            )
        layer = cls.__new__(cls)
        layer.__dict__.update(module.__dict__)
        for branch in layer.convs.children():
            for name, child in branch.named_children():
                if type(child) is nn.Conv2d and max(child.dilation) > 1:
                    branch._modules[name] = AtrousConv2d.from_conv(child)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """The projection of all branches."""
        own = x.dim() == 4 and not self.plain
        out = None
        if own and x.device.type in ("cpu", "cuda") and not has_hooks(self.convs):
            out = _concat(x, _branches_of(self.convs))
        if out is None:
            out = torch.cat([_run(row, x) for row in self.convs], 1)
        layers = _layers(self.project)
        last = _branch_of(layers[:3], False)
        if own and x.device.type == "cpu" and not has_hooks(self.project):
            projected = _concat(out, [last], pools=False)
            if projected is not None:
                for layer in layers[3:]:
                    projected = layer(projected)
                return projected
        result: Tensor = self.project(out)
        return result


def _run(row: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = row(x)
    return out if out.shape[2:] == x.shape[2:] else out.expand(-1, -1, *x.shape[2:])


def _concat(x: Tensor, branches: Sequence[_Branch | None], pools: bool = True) -> Tensor | None:
    """The branches in one operator, None where one of them does not fit."""
    found = [b for b in branches if b is not None and _is_fixed_or_none(b.norm)]
    if len(found) < len(branches):
        return None
    scales, biases = zip(*map(_affine, found), strict=True)
    weights = [b.conv.weight for b in found]
    rates = [max(b.conv.dilation) for b in found]
    count = len(found) - pools
    return concat(
        x,
        weights[:count],
        rates[:count],
        weights[-1] if pools else None,
        scales,
        biases,
        "relu",
        [_cache_of(branch.conv) for branch in found[:count]],
    )


def _cache_of(conv: nn.Conv2d) -> WeightCache | None:
    return conv.weight_cache() if isinstance(conv, AtrousConv2d) else None


def _is_fixed_or_none(norm: nn.Module) -> bool:
    return type(norm) is nn.Identity or is_fixed(norm)


def _affine(branch: _Branch) -> tuple[Tensor, Tensor]:
    """What stands behind the convolution: factor and shift."""
    weight, bias = branch.conv.weight, branch.conv.bias
    if type(branch.norm) is nn.Identity:
        scale = weight.new_ones(weight.shape[0])
        shift = torch.zeros_like(scale)
    else:
        scale, shift = factors(branch.norm)
    return scale, shift if bias is None else shift + bias.to(scale.dtype) * scale


def _branches_of(convs: nn.ModuleList) -> list[_Branch | None]:
    """Each of them, the last one pooling; None for what does not fit."""
    return [_branch_of(_layers(row), i + 1 == len(convs)) for i, row in enumerate(convs)]


def _layers(row: object) -> list[nn.Module]:
    """Of a Sequential; none of anything else."""
    return list(row) if isinstance(row, nn.Sequential) else []


def _branch_of(layers: Sequence[nn.Module], pools: bool) -> _Branch | None:
    """A convolution, its batch normalisation and ReLU; behind the mean of all pixels or not."""
    if pools:
        mean = layers[0] if layers else None
        if not isinstance(mean, nn.AdaptiveAvgPool2d) or mean.output_size not in (1, (1, 1)):
            return None
        layers = layers[1:]
    if len(layers) != 3:
        return None
    conv, norm, activation = layers
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, AtrousConv2d):
        return None
    if getattr(conv, "activation", None) is not None:
        return None
    rate, kernel = conv.dilation[0], conv.kernel_size
    fits = (
        kernel in (((1, 1),) if pools else ((1, 1), (3, 3)))
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.dilation == (rate, rate)
        and conv.padding in ("same", tuple(rate * (k // 2) for k in kernel))
        and isinstance(norm, (_BatchNorm, nn.Identity))
        and type(activation) is nn.ReLU
    )
    return _Branch(conv, norm) if fits else None


def is_aspp(module: nn.Module) -> bool:
    """Whether it is built as torchvision's ASPP, by class names and layers."""
    if type(module).__name__ != "ASPP" or [*module._modules] != ["convs", "project"]:
        return False
    convs, project = module._modules["convs"], module._modules["project"]
    if not isinstance(convs, nn.ModuleList) or len(convs) < 2 or module._parameters:
        return False
    names = [type(row).__name__ for row in convs]
    wanted = ["Sequential", *["ASPPConv"] * (len(convs) - 2), "ASPPPooling"]
    return (
        names == wanted
        and None not in _branches_of(convs)
        and _branch_of(_layers(project)[:3], False) is not None
    )
