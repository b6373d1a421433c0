# SPDX-License-Identifier: Apache-2.0
"""A convolution's weight as pydense's dense kernels read it, kept by its layer."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.optim.optimizer import register_optimizer_step_post_hook

from pydense import _library

_library.load()
_OPS = torch.ops.pydense


class _Steps:
    """How many steps optimizers took in this process, from the first question on.

    Fused optimizers write weights without raising their version.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)  # never one twice, whatever threads do
        self._last = 0
        self._listens = False

    def taken(self) -> int:
        """A number that changes with every step."""
        if not self._listens:  # twice, if two threads ask at once, does no harm
            register_optimizer_step_post_hook(self._count)
            self._listens = True
        return self._last

    # As torch's optimizers have it (compiled steps call it, too), and without loading dynamo here.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _count(self, *_: Any) -> None:
        self._last = next(self._numbers)


_STEPS = _Steps()


class PackedWeight:
    """Packs a weight once, until it changes; copies and pickles of it are empty.

    What counts as a change is what autograd counts (the tensor's version), another tensor, a step
    of any optimizer, and a call whose weight is to get a gradient. Other writing through
    ``weight.data`` is not seen. Several threads may call at once.
    """

    def __init__(self) -> None:
        # Key, packed weight, and the weight: held, so that its memory cannot become another's.
        # Set at once, so that threads see what belongs together.
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        self._trained_in_graph = False  # replays of it write the weight, which nothing counts

    def get(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weight, packed in this dtype, or None where it must not be kept.

        That is in traced code, for tensors without memory of their own, and where the weight is to
        get a gradient; on CUDA also while a graph is captured, which outlives what is kept, ever
        after a graph with a training step was, and where kernels read the weight as it is.
        """
        if (
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or type(weight) not in (Tensor, nn.Parameter)
            or weight.is_inference()
            or _functorch.is_functorch_wrapped_tensor(weight)
        ):
            return None
        cuda = weight.device.type == "cuda"
        if torch.is_grad_enabled() and weight.requires_grad:
            self._kept = None  # who trains it may write it by ways that nothing counts
            if cuda and torch.cuda.is_current_stream_capturing():
                self._trained_in_graph = True
            return None
        stream = None
        if cuda:
            if (
                self._trained_in_graph
                or _reads_in_place(weight, dtype)
                or torch.cuda.is_current_stream_capturing()
            ):
                return None
            # Another stream would have to wait for the copy.
            stream = torch.cuda.current_stream(weight.device).cuda_stream
        key = (
            weight.data_ptr(),
            weight.device,
            stream,
            weight._version,
            weight.shape,
            weight.stride(),
            weight.dtype,
            dtype,
            _OPS._cpu_capability(),
            _STEPS.taken(),
        )
        kept = self._kept
        if kept is not None and kept[0] == key:
            return kept[1]
        with torch.no_grad():
            packed: Tensor = _OPS._pack_dense_atrous_weight(weight.to(dtype), False)
        self._kept = key, packed, weight.detach()
        return packed

    def __deepcopy__(self, memo: Any) -> PackedWeight:
        return PackedWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()


def _reads_in_place(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether tensor cores take it as it is: channels side by side, in whole 16 bytes."""
    each = 16 // dtype.itemsize
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return weight.dtype == dtype and last and weight.shape[1] % each == 0
