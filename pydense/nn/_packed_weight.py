# SPDX-License-Identifier: Apache-2.0
"""A convolution's weight as pydense's dense kernels read it, kept by its layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch

from pydense import _library

_library.load()
_OPS = torch.ops.pydense


class PackedWeight:
    """Packs a weight once, until it changes; copies and pickles of it are empty.

    What counts as a change is what autograd counts: the tensor's version, or another tensor.
    Writing through ``weight.data`` is not seen.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._of: Tensor | None = None  # held, so that its memory cannot become another weight

    def get(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weight, packed in this dtype, or None where it must not be kept.

        That is in traced code, for tensors without memory of their own, and where the weight is to
        get a gradient.
        """
        if (
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or type(weight) not in (Tensor, nn.Parameter)
            or weight.is_inference()
            or (torch.is_grad_enabled() and weight.requires_grad)
            or _functorch.is_functorch_wrapped_tensor(weight)
        ):
            return None
        key = (
            weight.data_ptr(),
            weight._version,
            weight.shape,
            weight.stride(),
            weight.dtype,
            dtype,
            _OPS._cpu_capability(),
        )
        if self._packed is None or key != self._key:
            with torch.no_grad():
                self._packed = _OPS._pack_dense_atrous_weight(weight.to(dtype), False)
            self._key, self._of = key, weight.detach()
        return self._packed

    def __deepcopy__(self, memo: Any) -> PackedWeight:
        return PackedWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()
