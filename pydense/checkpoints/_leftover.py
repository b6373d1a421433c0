# SPDX-License-Identifier: Apache-2.0
"""Keys of a checkpoint that fill nothing: whether a model can do without them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import _transforms
from ._errors import CheckpointError
from ._match import Match, printable, usable
from ._rules import Extra, fill, match


def sort_rest(model: nn.Module, best: Match) -> tuple[list[str], list[tuple[str, str]]]:
    """Keys of the file that fill nothing: unexpected ones, and those dropped for a reason."""
    unexpected: list[str] = []
    dropped: list[tuple[str, str]] = []
    checks: dict[str, Callable[[Extra, str, Match], str | None]] = {
        "bilinear": _is_bilinear,
        "constant": _is_constant,
        "copy": _is_copy,
        "unused": lambda extra, name, best: str(extra.value),
    }
    for name in best.unused:
        why = None
        for extra in best.format.extras:
            if match(extra.theirs, name) is None:
                continue
            if extra.what in ("bilinear", "constant") and not getattr(model, extra.module, False):
                continue
            why = checks[extra.what](extra, name, best)
            break
        if why is None:
            unexpected.append(best.names[name])
        else:
            dropped.append((best.names[name], why))
    return unexpected, dropped


def _tensor(name: str, best: Match) -> Tensor:
    value = best.tensors[name]
    if not isinstance(value, Tensor) or not usable(value):
        raise CheckpointError(f"{printable(name)} must be a tensor, got {type(value).__name__}")
    return value


def _is_bilinear(extra: Extra, name: str, best: Match) -> str:
    value = _tensor(name, best)
    channels = value.shape[0] if value.dim() == 4 else 0
    if channels and value.shape[1] in (1, channels):
        groups = channels if value.shape[1] == 1 else 1
        size = (extra.size, extra.size)
        if value.shape[2:] == size and torch.allclose(
            value.float(), _transforms.bilinear(channels, extra.size, groups), atol=1e-6
        ):
            return "the fixed bilinear filter"
    raise CheckpointError(
        f"{name} {tuple(value.shape)} is not the bilinear filter of size {extra.size}: if it was "
        "learned, the model needs upsampling='learned'"
    )


def _is_constant(extra: Extra, name: str, best: Match) -> str:
    value = _tensor(name, best).float()
    if value.numel() and torch.allclose(value, torch.full_like(value, float(extra.value))):
        return f"the fixed factor {extra.value}"
    raise CheckpointError(f"{name} must be {extra.value} in all channels, as the model has it")


def _is_copy(extra: Extra, name: str, best: Match) -> str | None:
    places = match(extra.theirs, name)
    assert places is not None
    original = fill(str(extra.value), places)
    if original not in best.tensors:
        return None
    if torch.equal(_tensor(name, best), _tensor(original, best)):
        return f"the same as {original}"
    raise CheckpointError(f"{name} differs from {original}, of which it must be a copy")
