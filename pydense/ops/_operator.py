# SPDX-License-Identifier: Apache-2.0
"""Operators, called with as little Python as a call allows.

Between the layers of a network the caches hold maps and weights, no interpreter: there every line
of Python takes ten to thirty times as long as in a loop, and what ``torch.library`` does for a
trained operator half a millisecond, as much as a small convolution itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn import Parameter

_Kernel = TypeVar("_Kernel", bound=Callable[..., object])


def is_traced() -> bool:
    """Whether a graph is made that may see other sizes than these."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_eager() -> bool:
    """Whether nothing but autograd and the profiler looks at what operators do.

    Not so while a graph is traced or compiled, under functional transforms, forward-mode levels and
    modes (those that count FLOP among them). What tensors are is for :func:`are_plain` to say.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and _functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def are_plain(values: Iterable[object]) -> bool:
    """Whether all tensors among these hold numbers: no subclasses, no batches of a legacy vmap."""
    for value in values:
        kind = type(value)
        if kind is int or kind is bool or value is None:
            continue
        if isinstance(value, Tensor) and (
            (kind is not Tensor and kind is not Parameter)
            or _functorch.is_legacy_batchedtensor(value)
        ):
            return False
    return True


def operator(name: str) -> Callable[[_Kernel], _Kernel]:
    """Registers a function as ``torch.library.custom_op`` does, less what that does in every call.

    That looks for results that share memory with arguments, and keeps Dynamo out. The function must
    return new tensors, and must not change any.

    Args:
        name: Behind ``pydense::``.
    """

    def register(kernel: _Kernel) -> _Kernel:
        schema = torch.library.infer_schema(kernel, mutates_args=())
        torch.library.define(f"pydense::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"pydense::{name}", "default", kernel)
        return kernel

    return register


class Differentiable:
    """An operator that is given its derivatives, to be called through this.

    In eager mode, with plain tensors, the call goes around torch's dispatcher, by an
    ``autograd.Function`` with the same derivatives (a profile then shows what the operator calls,
    not the operator); all others are calls of the operator.
    """

    def __init__(
        self,
        name: str,
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        kernel: Callable[..., Tensor] | None = None,
    ) -> None:
        """Registers the derivatives.

        Args:
            name: Behind ``pydense::``.
            setup_context: As of ``torch.library.register_autograd``; called by position.
            backward: As there.
            kernel: What the operator is where it is Python; None where it is C++.
        """
        torch.library.register_autograd(f"pydense::{name}", backward, setup_context=setup_context)
        self._operator = getattr(torch.ops.pydense, name).default
        self._kernel = kernel or self._below_autograd

        def forward(ctx: Any, *arguments: Any) -> Tensor:
            output = self._kernel(*arguments)
            setup_context(ctx, arguments, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function: Any = type(f"{name}_", (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any) -> Tensor:
        """The operator's result; all arguments by position."""
        result: Tensor
        if not (is_eager() and are_plain(arguments)):
            result = self._operator(*arguments)
        elif torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            result = self._function.apply(*arguments)
        else:
            result = self._kernel(*arguments)
        return result

    def _below_autograd(self, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = self._operator(*arguments)
        return result
