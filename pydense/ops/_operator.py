# SPDX-License-Identifier: Apache-2.0
"""Operators, called with as little Python as a call allows.

Between the layers of a network the caches hold maps and weights, no interpreter: there every line
of Python takes ten to thirty times as long as in a loop, and what ``torch.library`` does for a
trained operator half a millisecond, as much as a small convolution itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn import Parameter

_Kernel = TypeVar("_Kernel", bound=Callable[..., object])
_Result = TypeVar("_Result")


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
    """Whether all tensors among these hold numbers.

    So do no subclasses, no batches of a legacy vmap, and none on the meta device. Lists are looked
    into.
    """
    for value in values:
        kind = type(value)
        if kind is int or kind is bool or value is None:
            continue
        if isinstance(value, (list, tuple)):
            if not are_plain(value):
                return False
            continue
        if isinstance(value, Tensor) and (
            (kind is not Tensor and kind is not Parameter)
            or value.is_meta
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


class Differentiable(Generic[_Result]):
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
        kernel: Callable[..., _Result] | None = None,
    ) -> None:
        """Registers the derivatives.

        Args:
            name: Behind ``pydense::``.
            setup_context: As of ``torch.library.register_autograd``; called by position.
            backward: As there: lists of tensors have lists of gradients.
            kernel: What the operator is where it is Python; None where it is C++.
        """
        torch.library.register_autograd(f"pydense::{name}", backward, setup_context=setup_context)
        self._operator = getattr(torch.ops.pydense, name).default
        self._kernel = kernel or self._below_autograd
        schema = self._operator._schema
        self._lists = [i for i, one in enumerate(schema.arguments) if _is_list(one)]
        self._returns_list = _is_list(schema.returns[0])
        self._has_lists = bool(self._lists) or self._returns_list
        kinds = [str(value.type) for value in (*schema.arguments, *schema.returns)]
        several = len(schema.returns) > 1 and any(map(_is_list, schema.returns))
        if several or "List[Optional[Tensor]]" in kinds:
            raise TypeError(f"{name}: lists must be of tensors, and results one list, got {schema}")
        forward, backward = self._functions(setup_context, backward)
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function: Any = type(f"{name}_", (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any) -> _Result:
        """The operator's result; all arguments by position."""
        result: Any
        if self._lists:  # tuples, which torch does not look into, become such
            arguments = tuple(
                list(value) if i in self._lists else value for i, value in enumerate(arguments)
            )
        if not (is_eager() and are_plain(arguments)):
            result = self._operator(*arguments)
        elif not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            result = self._kernel(*arguments)
        elif self._has_lists:
            lengths = [len(arguments[i]) for i in self._lists]
            result = self._function.apply(lengths, *self._flat(arguments))
            result = list(result) if self._returns_list else result
        else:
            result = self._function.apply(*arguments)
        found: _Result = result
        return found

    def _below_autograd(self, *arguments: Any) -> _Result:
        with torch._C._AutoDispatchBelowAutograd():
            result: _Result = self._operator(*arguments)
        return result

    def _functions(
        self, setup: Callable[..., None], backward: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What an ``autograd.Function`` consists of.

        It sees no tensors in lists: there they are arguments and results of their own.
        """

        def plain(ctx: Any, *arguments: Any) -> Any:
            output = self._kernel(*arguments)
            setup(ctx, arguments, output)
            return output

        def forward(ctx: Any, lengths: list[int], *flat: Any) -> Any:
            ctx.list_lengths = lengths
            output = plain(ctx, *self._nested(flat, lengths))
            return tuple(output) if self._returns_list else output

        def backward_of_lists(ctx: Any, *grads: Tensor | None) -> Any:
            of_flat = ctx.needs_input_grad
            ctx.needs_input_grad = self._nested(of_flat[1:], ctx.list_lengths)
            try:
                made = backward(ctx, *[[*grads]] if self._returns_list else grads)
            finally:
                ctx.needs_input_grad = of_flat
            return None, *self._flat(made)

        return (forward, backward_of_lists) if self._has_lists else (plain, backward)

    def _flat(self, arguments: Sequence[Any]) -> list[Any]:
        flat: list[Any] = []
        for i, value in enumerate(arguments):
            if i in self._lists:
                flat.extend(value)
            else:
                flat.append(value)
        return flat

    def _nested(self, flat: Sequence[Any], lengths: list[int]) -> tuple[Any, ...]:
        found: list[Any] = []
        first, left = 0, list(lengths)
        while first < len(flat) or left:
            if len(found) in self._lists:
                length = left.pop(0)
                found.append(list(flat[first : first + length]))
                first += length
            else:
                found.append(flat[first])
                first += 1
        return tuple(found)


def _is_list(value: Any) -> bool:
    """Whether an argument or a result is a list of tensors, by its schema."""
    return str(value.type) == "List[Tensor]"
