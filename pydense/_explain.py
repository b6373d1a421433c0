# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call takes, and why."""

from importlib import import_module
from typing import Any

_MODULES = {
    "atrous_conv2d": "atrous_conv",
    "aspp_sum": "aspp",
    "aspp_concat": "aspp_concat",
    "atrous_separable_conv2d": "atrous_separable_conv",
}


def explain(op: str, *arguments: Any, **options: Any) -> str:
    """Says which kernels a function of ``pydense.ops`` would run, and why; nothing is computed.

    Args:
        op: The function's name: ``"atrous_conv2d"``, which has kernels of its own for some calls
            alone, ``"aspp_concat"``, which has them for some branches alone, ``"aspp_sum"`` or
            ``"atrous_separable_conv2d"``, whose products are sometimes torch's.
        arguments: Of that call.
        options: Of that call.

    Returns:
        One line, such as ``"pydense's depthwise kernels: ..."`` or ``"torch's convolution: ..."``;
        of ``aspp_concat`` one for each branch, such as ``"branch 0 (1x1): torch's ..."``.

    Raises:
        ValueError: A function that does not choose.

    Example:
        >>> import torch
        >>> import pydense
        >>> pydense.explain("atrous_conv2d", torch.rand(1, 4, 9, 9), torch.rand(8, 4, 3, 3))[:19]
        "torch's convolution"
    """
    if op not in _MODULES:
        names = ", ".join(repr(name) for name in _MODULES)
        raise ValueError(f"explain: op must be one of {names}, got {op!r}")
    function = getattr(import_module(f".ops.{_MODULES[op]}", __package__), f"explain_{op}")
    return str(function(*arguments, **options))
