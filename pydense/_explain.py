# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call takes, and why."""

from typing import Any


def explain(op: str, *arguments: Any, **options: Any) -> str:
    """Says which kernels a function of ``pydense.ops`` would run, and why; nothing is computed.

    Args:
        op: The function's name; so far ``"atrous_conv2d"``, which has kernels of its own for some
            calls alone.
        arguments: Of that call.
        options: Of that call.

    Returns:
        One line, such as ``"pydense's depthwise kernels: ..."`` or ``"torch's convolution: ..."``.

    Raises:
        ValueError: A function that does not choose.

    Example:
        >>> import torch
        >>> import pydense
        >>> pydense.explain("atrous_conv2d", torch.rand(1, 4, 9, 9), torch.rand(8, 4, 3, 3))[:19]
        "torch's convolution"
    """
    if op != "atrous_conv2d":
        raise ValueError(f"explain: op must be one of 'atrous_conv2d', got {op!r}")
    from .ops.atrous_conv import explain_atrous_conv2d

    return explain_atrous_conv2d(*arguments, **options)
