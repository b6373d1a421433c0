# SPDX-License-Identifier: Apache-2.0
"""Atrous convolution as a layer, and the way of existing models to it."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import Tensor, nn

from pydense.ops.atrous_conv import convolve

from ._packed_weight import PackedWeight

_Model = TypeVar("_Model", bound=nn.Module)


class AtrousConv2d(nn.Conv2d):
    """``nn.Conv2d`` over :func:`pydense.ops.atrous_conv2d`: the same arguments, parameters, keys.

    Padding other than with zeros is torch's. In eval mode and without gradients, a weight that
    pydense's dense kernels read is packed once and kept beside the parameter, until that changes
    (not through ``weight.data``), the mode is set, or the layer moves; neither state_dict nor
    copies hold it.

    Example:
        >>> import torch
        >>> from pydense.nn import AtrousConv2d
        >>> layer = AtrousConv2d(8, 8, 3, padding=6, dilation=6, groups=8)
        >>> layer(torch.rand(1, 8, 17, 17)).shape
        torch.Size([1, 8, 17, 17])
    """

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

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            out: Tensor = super()._conv_forward(input, weight, bias)
            return out
        x = input if input.dim() == 4 else input[None]
        out = convolve(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            None,
            None if self.training else self._packed_weight(),
        )
        return out if input.dim() == 4 else out[0]

    def _packed_weight(self) -> PackedWeight:
        cache: PackedWeight = self.__dict__.setdefault("_packed", PackedWeight())
        return cache

    def train(self, mode: bool = True) -> AtrousConv2d:
        """As of ``nn.Module``; forgets the packed weight."""
        self.__dict__.pop("_packed", None)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> AtrousConv2d:
        self.__dict__.pop("_packed", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def convert(model: _Model) -> _Model:
    """Puts :class:`AtrousConv2d` in the place of every dilated ``nn.Conv2d``, in place.

    Parameters stay the same objects under the same keys, so optimizers and checkpoints keep
    working. A module that occurs several times is replaced by one.

    Args:
        model: Any module; a dilated ``nn.Conv2d`` itself is returned as an ``AtrousConv2d``.

    Returns:
        The model.

    Raises:
        TypeError: Something else than a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    made: dict[nn.Module, nn.Module] = {}

    def replaced(module: nn.Module) -> nn.Module:
        if type(module) is not nn.Conv2d or max(module.dilation) == 1:
            return module
        if module not in made:
            made[module] = AtrousConv2d.from_conv(module)
        return made[module]

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = replaced(child)
    return cast("_Model", replaced(model))
