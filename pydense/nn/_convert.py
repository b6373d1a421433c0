# SPDX-License-Identifier: Apache-2.0
"""The way of existing models to pydense's layers."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn

from .aspp_concat import ASPP, is_aspp
from .atrous_conv import AtrousConv2d

_Model = TypeVar("_Model", bound=nn.Module)


def convert(model: _Model) -> _Model:
    """Puts pydense's layers in the place of those of a model, in place.

    Every dilated ``nn.Conv2d`` becomes an :class:`AtrousConv2d`, and every head that is built as
    torchvision's ``ASPP``, by the names of its classes and its layers, an :class:`ASPP`.

    Parameters stay the same objects under the same keys, so optimizers and checkpoints keep
    working. A module that occurs several times is replaced by one.

    Args:
        model: Any module; one that is itself of these kinds is returned as its replacement.

    Returns:
        The model.

    Raises:
        TypeError: Something else than a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    made: dict[nn.Module, nn.Module] = {}

    def replaced(module: nn.Module) -> nn.Module:
        if module not in made:
            if type(module) is nn.Conv2d and max(module.dilation) > 1:
                made[module] = AtrousConv2d.from_conv(module)
            elif not isinstance(module, ASPP) and is_aspp(module):
                made[module] = ASPP.from_module(module)
        return made.get(module, module)

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = replaced(child)
    return cast("_Model", replaced(model))
