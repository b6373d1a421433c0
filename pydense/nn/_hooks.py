# SPDX-License-Identifier: Apache-2.0
"""Whether a layer may be left out, its numbers used elsewhere."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for calls of it, or of a layer in it: these have to happen."""
    return any(
        bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        for m in module.modules()
    )
