# SPDX-License-Identifier: Apache-2.0
"""Which operators the layers call: pydense's own, or plain torch's."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from pydense import ops, reference

_Model = TypeVar("_Model", bound=nn.Module)

OPERATORS: dict[str, Any] = {"pydense": ops, "reference": reference}
"""Sets of functions with the names and arguments of ``pydense.ops``, by name."""


class UsesOperators:
    """Part of every layer that calls pydense's operators: where it finds them.

    Instances hold a name and no module, so that copies and pickles of them work.
    """

    operator_set: str = "pydense"

    @property
    def operators(self) -> Any:
        """The functions: ``pydense.ops``, or ``pydense.reference`` in a plain-torch twin."""
        return OPERATORS[self.operator_set]

    @property
    def plain(self) -> bool:
        """Whether layers are to be what their definitions say, one by one."""
        return self.operator_set != "pydense"


def use_operators(model: _Model, name: str) -> _Model:
    """Sets what all pydense layers of a model call, in place; parameters and keys stay.

    With ``"reference"`` the model becomes its twin in plain torch: every layer calls the functions
    of :mod:`pydense.reference`, and layers that fuse others (:class:`ASPP`,
    :class:`AtrousSeparableConv2d`, :class:`UpsampleConcatConv1x1`) run them one after the other. It
    then works on every device, and with everything that torch's own operators support. With
    ``"pydense"`` it is what it was.

    Args:
        model: Any module.
        name: ``"pydense"`` or ``"reference"``.

    Returns:
        The model.

    Raises:
        ValueError: Another name.

    Example:
        >>> import torch
        >>> from pydense.nn import ASPPSum, use_operators
        >>> head, x = ASPPSum(8, 3).double(), torch.rand(1, 8, 9, 9, dtype=torch.float64)
        >>> own = head(x)
        >>> torch.allclose(own, use_operators(head, "reference")(x))
        True
    """
    if name not in OPERATORS:
        known = ", ".join(map(repr, OPERATORS))
        raise ValueError(f"use_operators: name must be one of {known}, got {name!r}")
    for module in model.modules():
        if isinstance(module, UsesOperators):
            module.operator_set = name
    return model
