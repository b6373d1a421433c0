# SPDX-License-Identifier: Apache-2.0
"""Keys of a checkpoint that fill nothing: whether a model can do without them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import _transforms
from ._errors import CheckpointError, printable
from ._match import Match
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


def missing_constants(model: nn.Module, best: Match) -> list[str]:
    """Fixed factors that files of such a model have, and this one has not.

    Without them it is of a net that multiplies by nothing there, with the same keys otherwise.
    """
    return [
        extra.theirs
        for extra in best.format.extras
        if extra.what == "constant"
        and getattr(model, extra.module, False)
        and extra.theirs not in best.tensors
    ]


def _tensor(name: str, best: Match) -> Tensor:
    value = best.tensors[name]
    if not isinstance(value, Tensor) or not _transforms.usable(value):
        raise CheckpointError(
            f"{printable(name)} must be a tensor with all its numbers, got {type(value).__name__}"
        )
    return value


def _is_bilinear(extra: Extra, name: str, best: Match) -> str:
    value = _tensor(name, best)
    channels = value.shape[0] if value.dim() == 4 else 0
    if channels and value.shape[1] in (1, channels):
        groups = channels if value.shape[1] == 1 else 1
        size = (extra.size, extra.size)
        if value.shape[2:] == size and value.is_floating_point():
            # Rounded as the file's: 16 bits hold few of these numbers.
            expected = _transforms.bilinear(channels, extra.size, groups).to(value.dtype)
            if torch.allclose(value.float(), expected.float(), atol=1e-6):
                return "the fixed bilinear filter"
    raise CheckpointError(
        f"{printable(name)} {tuple(value.shape)} is not the bilinear filter of size "
        f"{extra.size}: if it was learned, the model needs upsampling='learned'"
    )


def _is_constant(extra: Extra, name: str, best: Match) -> str:
    value = _tensor(name, best)
    if value.numel() == extra.channels and value.is_floating_point():
        expected = torch.full_like(value, float(extra.value))
        if torch.allclose(value.float(), expected.float(), atol=0):
            return f"the fixed factor {extra.value}"
    raise CheckpointError(
        f"{printable(name)} must be {extra.value} in all {extra.channels} channels, as the model "
        "has it"
    )


def _is_copy(extra: Extra, name: str, best: Match) -> str | None:
    places = match(extra.theirs, name)
    assert places is not None
    original = fill(str(extra.value), places)
    if original not in best.tensors:
        return None
    value, like = _tensor(name, best), _tensor(original, best)
    if value.dtype == like.dtype and torch.equal(value, like):
        return f"the same as {original}"
    raise CheckpointError(
        f"{printable(name)} differs from {printable(original)}, of which it must be a copy"
    )
