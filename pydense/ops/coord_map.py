# SPDX-License-Identifier: Apache-2.0
"""Coordinate maps of layers, and the crop offsets that align two feature maps.

A layer maps a coordinate of its input to the coordinate of its output that sees it in the middle of
its receptive field: out = a in + b along each axis. Chains of layers compose; rational numbers keep
it exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from . import _crf_arguments as check
from . import _upsample_arguments as arguments

Pair = int | tuple[int, int]
Offset = int | Fraction


@dataclass(frozen=True)
class Conv:
    """A convolution or pooling; whether sizes are rounded up does not matter here."""

    kernel_size: Pair
    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1


Pool = Conv


@dataclass(frozen=True)
class Deconv:
    """A transposed convolution."""

    kernel_size: Pair
    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1


@dataclass(frozen=True)
class Crop:
    """A crop that starts at ``offset``."""

    offset: float | Fraction | tuple[float | Fraction, float | Fraction]


@dataclass(frozen=True)
class Pointwise:
    """A layer that keeps every pixel where it is."""


@dataclass(frozen=True)
class AxisCoordinates:
    """out = scale * in + shift."""

    scale: Fraction
    shift: Fraction

    def then(self, other: AxisCoordinates) -> AxisCoordinates:
        """This map, followed by another."""
        return AxisCoordinates(other.scale * self.scale, other.scale * self.shift + other.shift)


Layer = Conv | Deconv | Crop | Pointwise | nn.Module
Layers = Layer | Sequence[Any]
Maps = tuple[AxisCoordinates, AxisCoordinates]

_IDENTITY = AxisCoordinates(Fraction(1), Fraction(0))
_POINTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.Dropout,
    nn.Dropout2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.LocalResponseNorm,
)


def coordinate_map(layers: Layers) -> Maps:
    """The coordinate map of a chain of layers, for the axes (y, x).

    Args:
        layers: A layer or a sequence of layers in the order of the data, nested as one likes:
            ``Conv`` (also for pooling, as ``Pool``), ``Deconv``, ``Crop`` and ``Pointwise`` of this
            module, or layers of a network: ``nn.Conv2d``, ``nn.ConvTranspose2d``, ``nn.MaxPool2d``,
            ``nn.AvgPool2d``, ``nn.Upsample`` by a factor, ``pydense.nn.UpsampleCrop``,
            ``nn.Sequential``, and activations, normalisations and dropout.

            ========================  ======  =======================================
            layer                     scale   shift
            ========================  ======  =======================================
            convolution, pooling      1/s     (p - (k_eff - 1) / 2) / s
            transposed convolution    s       (k_eff - 1) / 2 - p
            crop at o                 1       -o
            upsampling by s           s       (s - 1) / 2
            ========================  ======  =======================================

            with stride s, padding p and k_eff = (k - 1) * dilation + 1.

    Returns:
        Two ``AxisCoordinates`` with exact fractions.

    Raises:
        ValueError: Numbers out of range, an upsampling whose map is not the one above.
        TypeError: A layer of another kind.

    Source: Caffe's ``coord_map.py``.
    """
    return _coordinate_map("coordinate_map", layers)


def crop_offset(layers: Layers, reference: Layers = (), *, real: bool = False) -> Any:
    """Where to crop a feature map so that it lies over another one.

    Both are computed from one blob, an image as a rule: the map to be cropped by ``layers``, the
    one it is to lie over by ``reference`` (by nothing: the blob itself). The crop starts at the
    difference of the two coordinate maps.

    Args:
        layers: Layers from the common blob to the map that is cropped; see ``coordinate_map``.
        reference: Layers from the common blob to the map that gives the size.
        real: Return the exact offset also where it is negative or no integer, which Caffe refuses;
            ``upsample_crop`` takes it.

    Returns:
        The offset for ``upsample_crop``: one number, or (y, x) where the axes differ. An int or,
        with ``real`` and where it is none, a ``Fraction``.

    Raises:
        ValueError: The two maps differ in scale; or, without ``real``, the offset is negative or
            not an integer. See also ``coordinate_map``.
        TypeError: A layer of another kind.

    Source: Caffe's ``coord_map.py`` (``crop``).

    Example:
        FCN-32s: the image is padded by 100, pooled five times, and upsampled by 32.

        >>> from pydense.ops.coord_map import Conv, Deconv, Pool, crop_offset
        >>> stages = [[Conv(3, padding=1)] * n + [Pool(2, stride=2)] for n in (2, 2, 3, 3, 3)]
        >>> stages[0][0] = Conv(3, padding=100)
        >>> crop_offset([*stages, Conv(7), Conv(1), Conv(1), Deconv(64, stride=32)])
        19
    """
    op = "crop_offset"
    check.flag(op, "real", real)
    offsets = []
    pairs = zip("yx", _coordinate_map(op, layers), _coordinate_map(op, reference), strict=True)
    for axis, own, other in pairs:
        if own.scale != other.scale:
            raise ValueError(
                f"{op}: layers and reference must have the same scale to their common blob, got "
                f"{own.scale} and {other.scale} along {axis} (scale mismatch)"
            )
        offset = own.shift - other.shift
        if not real and offset < 0:
            raise ValueError(
                f"{op}: the offset must not be negative, got {offset} along {axis}: the map does "
                "not reach the start of the reference (pad more, or pass real=True)"
            )
        if not real and offset.denominator != 1:
            raise ValueError(
                f"{op}: the offset must be an integer, got {offset} along {axis}: no crop aligns "
                "the maps (pass real=True and interpolate at that offset)"
            )
        offsets.append(int(offset) if offset.denominator == 1 else offset)
    return offsets[0] if offsets[0] == offsets[1] else (offsets[0], offsets[1])


def _coordinate_map(op: str, layers: Layers) -> Maps:
    y, x = _IDENTITY, _IDENTITY
    for index, layer in enumerate(_flat(layers)):
        own_y, own_x = _map_of(op, f"layer {index}", layer)
        y, x = y.then(own_y), x.then(own_x)
    return y, x


def _flat(layers: Layers) -> Iterator[Any]:
    if isinstance(layers, (list, tuple, nn.Sequential, nn.ModuleList)):
        for layer in layers:
            yield from _flat(layer)
    else:
        yield layers


def _map_of(op: str, name: str, layer: Any) -> Maps:
    if isinstance(layer, (Pointwise, *_POINTWISE)):
        return _IDENTITY, _IDENTITY
    if isinstance(layer, Crop):
        return _crop(op, name, layer.offset)
    if isinstance(layer, (nn.ConvTranspose2d, Deconv)):
        return _windows(op, name, layer, _deconv)
    if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, Conv)):
        return _windows(op, name, layer, _conv)
    if isinstance(layer, nn.Upsample):
        return _upsample(op, name, layer)
    if hasattr(layer, "coordinate_layers"):  # pydense.nn.UpsampleCrop
        return _coordinate_map(op, layer.coordinate_layers())
    raise TypeError(
        f"{op}: {name} must be Conv, Pool, Deconv, Crop, Pointwise or a torch layer with a "
        f"coordinate map, got {type(layer).__name__}"
    )


def _conv(k: int, s: int, p: Fraction) -> AxisCoordinates:
    return AxisCoordinates(Fraction(1, s), (p - Fraction(k - 1, 2)) / s)


def _deconv(k: int, s: int, p: Fraction) -> AxisCoordinates:
    return AxisCoordinates(Fraction(s), Fraction(k - 1, 2) - p)


def _windows(
    op: str, name: str, layer: Any, make: Callable[[int, int, Fraction], AxisCoordinates]
) -> Maps:
    kernels = arguments.pair(op, f"kernel_size of {name}", layer.kernel_size, 1)
    strides = arguments.pair(op, f"stride of {name}", layer.stride, 1)
    dilations = arguments.pair(op, f"dilation of {name}", getattr(layer, "dilation", 1), 1)
    sizes = [(k - 1) * d + 1 for k, d in zip(kernels, dilations, strict=True)]
    if layer.padding == "same":  # the odd element of an even window goes to the end
        paddings: Sequence[int] = [(k - 1) // 2 for k in sizes]
    elif layer.padding == "valid":
        paddings = (0, 0)
    else:
        paddings = arguments.pair(op, f"padding of {name}", layer.padding, 0)
    y, x = (make(k, s, Fraction(p)) for k, s, p in zip(sizes, strides, paddings, strict=True))
    return y, x


def _crop(op: str, name: str, offset: Any) -> Maps:
    row = offset if isinstance(offset, (list, tuple)) else (offset, offset)
    if len(row) != 2:
        raise ValueError(f"{op}: offset of {name} must be a number or (y, x), got {offset!r}")
    y, x = (AxisCoordinates(Fraction(1), -arguments.exact(op, f"offset of {name}", o)) for o in row)
    return y, x


def _upsample(op: str, name: str, layer: nn.Upsample) -> Maps:
    factor: Any = layer.scale_factor
    if factor is None or layer.align_corners or layer.mode not in ("bilinear", "nearest-exact"):
        raise ValueError(
            f"{op}: {name} must upsample by a factor, bilinearly with align_corners=False or "
            f"nearest-exact, got {layer}"
        )
    row = factor if isinstance(factor, (list, tuple)) else (factor, factor)
    scales = [arguments.exact(op, f"scale_factor of {name}", value) for value in row]
    if layer.recompute_scale_factor and any(scale.denominator != 1 for scale in scales):
        raise ValueError(
            f"{op}: {name} must have a whole scale_factor with recompute_scale_factor=True, which "
            f"makes the map depend on the size, got {layer.scale_factor}"
        )
    y, x = (AxisCoordinates(scale, (scale - 1) / 2) for scale in scales)
    return y, x
