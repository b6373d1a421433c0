# SPDX-License-Identifier: Apache-2.0
"""Where an operator's kernels run: on the CPU, as CUDA kernels under the shim, on a GPU.

Under the shim the public functions, autograd, fake kernels and schemas are those that users get:
only the CPU kernel of each ``torch.ops.pydense`` operator is replaced, by the CUDA launcher that
``tests/simt`` compiled for the CPU (``torch.ops.pydense_simt``).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.library import Library

from pydense.ops import clear_lattice_cache

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("cpu", "simt", "cuda")


@dataclass(frozen=True)
class Backend:
    """What the ``backend`` fixture gives: make tensors on ``device``, call the public functions."""

    name: str
    device: torch.device

    @property
    def is_cuda_code(self) -> bool:
        """Whether CUDA kernels are what runs."""
        return self.name != "cpu"


def simt_library() -> Path:
    """The operator library of ``tests/simt``, whether it is built or not."""
    default = ROOT / "build" / "simt" / "libpydense_simt.so"
    return Path(os.environ.get("PYDENSE_SIMT_LIBRARY", default))


def missing(name: str) -> str | None:
    """Why a backend is not to be had here, None where it is."""
    if name == "cuda" and not torch.cuda.is_available():
        return "no GPU on this machine"
    if name == "simt" and not simt_library().exists():
        return "the CUDA kernels are not built for the CPU: see CONTRIBUTING.md, Test"
    return None


@functools.cache
def simt_operators() -> tuple[str, ...]:
    """Loads the library; the operators that have a CUDA kernel in it."""
    torch.ops.load_library(simt_library())
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    prefix = "pydense_simt::"
    return tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def simt_launches() -> int:
    """How many launches the shim has run."""
    simt_operators()
    return int(torch.ops.pydense_simt._launches())


def _noting(run: Callable[..., Any], operator: str, used: set[str]) -> Callable[..., Any]:
    def noted(*arguments: Any, **options: Any) -> Any:
        used.add(operator)
        return run(*arguments, **options)

    return noted


@contextmanager
def use(name: str, schedule: int = 2, used: set[str] | None = None) -> Iterator[Backend]:
    """Make ``torch.ops.pydense`` run on a backend.

    Args:
        name: One of ``NAMES``.
        schedule: Of the shim: 0 runs threads in order, 1 in reverse, others in a random order.
        used: Of the shim: gets the names of the operators that run.
    """
    if name != "simt":
        yield Backend(name, torch.device(name))
        return
    operators = simt_operators()
    torch.ops.pydense_simt._set_schedule(schedule)
    clear_lattice_cache()  # lattices of the CPU kernels are of another form, on the same device
    library = Library("pydense", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
            for operator in operators:
                run = getattr(torch.ops.pydense_simt, operator)
                library.impl(operator, run if used is None else _noting(run, operator, used), "CPU")
        yield Backend(name, torch.device("cpu"))
    finally:
        library._destroy()
        clear_lattice_cache()
