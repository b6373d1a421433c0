# SPDX-License-Identifier: Apache-2.0
"""Which key format a checkpoint has: the one whose keys fit a model best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from . import _transforms, ademxapp, deeplab_v2, fcn, hrnet, pspnet, refinenet, segnet, unet
from . import torchvision as torchvision_formats
from ._errors import CheckpointError, printable
from ._rules import Family, Format, Rule, find, fits, match

_FAMILIES: tuple[Family, ...] = tuple(
    chain.from_iterable(
        module.FAMILIES
        for module in (
            *(ademxapp, deeplab_v2, fcn, hrnet, pspnet),
            *(refinenet, segnet, torchvision_formats, unet),
        )
    )
)
NATIVE = Format("pydense")
# What training scripts put before every key: DataParallel, a module around the network.
_PREFIXES = ("module.", "model.")


@dataclass
class Match:
    """How the keys of a file fit a format."""

    format: Format
    prefix: str
    tensors: dict[str, Any]
    names: dict[str, str]
    found: dict[str, tuple[Rule, str]]
    unused: list[str]
    equivalent: tuple[str, ...] = ()

    @property
    def score(self) -> tuple[int, int]:
        known = tuple(extra.theirs for extra in self.format.extras)
        return len(self.found), -sum(not fits(known, name) for name in self.unused)


def formats_of(model: nn.Module | str) -> list[Format]:
    """The formats of a model, or of all variants of a class."""
    return [row for row in _published(model) if isinstance(model, str) or of_variant(row, model)]


def of_variant(format: Format, model: nn.Module) -> bool:
    """Whether a format is of the model's variant."""
    return format.of is None or getattr(model, format.of[0], format.of[1]) == format.of[1]


def _published(model: nn.Module | str) -> list[Format]:
    classes = [model] if isinstance(model, str) else [c.__name__ for c in type(model).__mro__]
    for name in classes:
        for family in _FAMILIES:
            if name in family.models:
                return [*family.formats, NATIVE]
    return [NATIVE]


def classifier_of(model: nn.Module) -> tuple[str, ...]:
    for cls in type(model).__mro__:  # the nearest: CRF-as-RNN is an FCN too
        for family in _FAMILIES:
            if cls.__name__ in family.models:
                return family.classifier
    return ()


def named(model: nn.Module, name: str) -> Format:
    rows = {format.name: format for format in formats_of(model)}
    for other in _published(model):
        if other.name == name and name not in rows:
            raise CheckpointError(f"{_of_another(other, model)}: must be one of {', '.join(rows)}")
    if name not in rows:
        raise CheckpointError(
            f"format must be one of {', '.join(rows)} for {type(model).__name__}, got {name!r}"
        )
    return rows[name]


def _of_another(format: Format, model: nn.Module) -> str:
    assert format.of is not None
    option, value = format.of
    return (
        f"format {format.name} is of {type(model).__name__} with {option}={value!r}, this one has "
        f"{getattr(model, option)!r}"
    )


def other_options(model: nn.Module, format: Format) -> dict[str, Any]:
    """Options of the format's networks that the model has not."""
    found = {}
    for option, value in format.options:
        value = value(model) if callable(value) else value
        for module in model.modules() if value is not None else ():
            own = getattr(module, option, value)
            if value is False and not isinstance(own, bool):
                own = own is not None  # a child, or none
            if own != value:
                found[option] = value
    return found


def best_match(
    model: nn.Module, own: Mapping[str, Tensor], entries: dict[str, Any], name: str | None
) -> Match:
    rows = [named(model, name)] if name else [f for f in formats_of(model) if f.auto]
    matches = [_match(format, own, entries) for format in rows]
    best = max(matches, key=lambda row: row.score)
    if not best.found:
        for other in _published(model) if name is None else ():
            if not of_variant(other, model) and _match(other, own, entries).found:
                raise CheckpointError(_of_another(other, model))
        raise CheckpointError(
            f"no key of the checkpoint is one of {type(model).__name__} in the formats "
            f"{', '.join(f.name for f in rows)}; it begins with "
            f"{', '.join(printable(key) for key in [*entries][:3])}"
        )
    same = [
        row.format.name
        for row in matches
        if row is not best and row.score == best.score and row.found == best.found
    ]
    best.equivalent = tuple(same)
    return best


def _match(format: Format, own: Mapping[str, Tensor], entries: dict[str, Any]) -> Match:
    """The best of all ways to take prefixes off."""
    best: Match | None = None
    for prefix in _prefixes(format, entries):
        row = _match_behind(prefix, format, own, entries)
        if best is None or row.score > best.score:
            best = row
    assert best is not None
    return best


def _prefixes(format: Format, entries: dict[str, Any]) -> list[str]:
    """Candidates, those first that take nothing off."""
    candidates, known = [""], tuple(p for p in (*_PREFIXES, format.prefix) if p)
    for prefix in candidates:
        for part in known:
            longer = prefix + part
            if longer not in candidates and any(key.startswith(longer) for key in entries):
                candidates.append(longer)
        if len(candidates) > 16:
            break
    return candidates


def _match_behind(
    prefix: str, format: Format, own: Mapping[str, Tensor], entries: dict[str, Any]
) -> Match:
    names = {key.removeprefix(prefix): key for key in entries}
    if len(names) < len(entries):  # both "module.x" and "x": take nothing off
        prefix, names = "", {key: key for key in entries}
    tensors = {short: entries[key] for short, key in names.items()}
    found: dict[str, tuple[Rule, str]] = {}
    taken: set[str] = set()
    for key, like in own.items():
        row = find(format, key, like.shape[0] if like.dim() else 0)
        if row is None:
            continue
        rule = row[0]
        for name in (*row[1], *_other_classes(format, key, row[1], tensors)):
            if isinstance(tensors.get(name), Tensor) and _transforms.usable(tensors[name]):
                found[key] = (rule, name)
                taken.update(_transforms.used(rule.how, name))
                break
    unused = [name for name in tensors if name not in taken]
    return Match(format, prefix, tensors, names, found, unused)


def _other_classes(
    format: Format, key: str, names: Sequence[str], tensors: Mapping[str, Any]
) -> list[str]:
    """Keys that differ from the expected ones only in the number of classes in them."""
    row = find(format, key)
    if row is None or row[1] == tuple(names):
        return []
    return [name for name in tensors for template in row[1] if match(template, name) is not None]
