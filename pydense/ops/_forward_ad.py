# SPDX-License-Identifier: Apache-2.0
"""Forward-mode derivatives: operators of torch.library cannot have them, so tangents are refused.

Without this, an operator would drop the tangents of its inputs, and its output would count as
constant.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def refuse_tangent(op: str, name: str, tensor: Tensor) -> None:
    """Raise NotImplementedError for a tensor that has, or may have, a tangent.

    Inside ``torch.func.jvp`` and ``jacfwd`` that is every tensor that depends on their arguments,
    since tangents of outer levels cannot be seen; in code that is compiled inside a forward-mode
    level it is every tensor. Outside of forward mode it costs one comparison.
    """
    if forward_ad._current_level < 0:
        return
    dual = (
        torch.compiler.is_compiling()
        or _functorch.is_functorch_wrapped_tensor(tensor)
        or forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
    )
    if dual:
        raise NotImplementedError(
            f"{op}: {name} must have no tangent, got one: there is no forward-mode derivative "
            "(torch.func.jvp, jacfwd, torch.autograd.forward_ad); use backward"
        )
