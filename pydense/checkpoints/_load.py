# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint into a model, and writing one as others have it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import _transforms, ademxapp, deeplab_v2, fcn, hrnet, pspnet, refinenet, segnet, unet
from . import torchvision as torchvision_formats
from ._errors import CheckpointError
from ._files import About, read, write
from ._rules import COUNTER, Extra, Family, Format, Rule, fill, find, fits, match

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
_SHOWN = 8


@dataclass
class Report:
    """What became of every key.

    Attributes:
        format: Name of the key format.
        equivalent: Other formats in which the keys mean the same.
        prefix: What was taken off the keys.
        preprocessing: What the format's networks expect; None where the format does not say.
        about: What the file says of itself.
        loaded: Keys of the model that were filled.
        missing: Keys of the model that the file has not.
        unexpected: Keys of the file that the model has not.
        mis_shaped: (key of the model, shape in the file, shape in the model).
        reinitialized: Keys of the classifier that were left as the constructor made them.
        kept: Keys of the model that files of this format never have; left as they were.
        dropped: (key of the file, why the model needs none).
    """

    format: str = ""
    equivalent: tuple[str, ...] = ()
    prefix: str = ""
    preprocessing: str | None = None
    about: About = field(default_factory=About)
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mis_shaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    reinitialized: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mis_shaped)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, keys of {self.format}"]
        if self.prefix:
            lines[0] += f" behind {self.prefix!r}"
        shapes = [f"{key} {theirs} for {ours}" for key, theirs, ours in self.mis_shaped]
        for what, rows in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("mis-shaped", shapes),
            ("classifier left as it was", self.reinitialized),
            ("not in this format", self.kept),
            ("dropped", [f"{key} ({why})" for key, why in self.dropped]),
        ):
            if rows:
                more = f", and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
                lines.append(f"{what} ({len(rows)}): {', '.join(rows[:_SHOWN])}{more}")
        return "\n".join(_printable(line) for line in lines)


def _printable(text: str) -> str:
    """Names come from outside: nothing in them may drive a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def formats(model: nn.Module | str) -> list[str]:
    """Names of the key formats that a model (or a class of that name) can be loaded from."""
    return [format.name for format in _formats(model)]


def load(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    format: str | None = None,
    reinit_classifier: bool = False,
    strict: bool = True,
) -> Report:
    """Fills a model from a checkpoint in any of the published key formats.

    Keys are compared one by one after wrappers (``{"state_dict": ...}``) and prefixes (``module.``,
    ``model.``, ``base.``, ``Scale.``) are taken off. The format is the one whose keys fit best, and
    the report says which. The model is changed only if everything fits, or with ``strict=False``.

    Some keys need no place in a model: FCN's fixed deconvolutions are dropped once they are seen to
    hold the bilinear filter (weights that were learned need a model with
    ``upsampling="learned"``); others take no part in the network (``vgg16.*`` in SegNet). Counts of
    batches (``num_batches_tracked``), which Caffe, MXNet and old PyTorch files lack, stay as they
    are. The report names all of them.

    Args:
        model: One of ``pydense.models``, or any module, whose own keys the file must have then.
        source: A file (PyTorch, safetensors, ``.caffemodel``, ``.params``), always read with
            ``weights_only=True``; or a mapping from names to tensors.
        format: One of :func:`formats`. Those that begin a training from a classifier's weights
            (``"torchvision-backbone"``, ``"hrnet-imagenet"``) must be asked for.
        reinit_classifier: Layers that give the logits may be missing or have another number of
            classes; they stay as the constructor made them.
        strict: False: load what fits, warn of the rest.

    Returns:
        What became of every key.

    Raises:
        CheckpointError: A file that cannot be read; with ``strict`` any key that is missing,
            unexpected or mis-shaped; a filter that should be bilinear and is not. (A ValueError.)

    Example:
        >>> from pydense import checkpoints, models
        >>> model = models.unet(num_classes=2)
        >>> state = {f"module.{k}": v for k, v in model.state_dict().items()}
        >>> print(checkpoints.load(model, state))
        118 tensors loaded, keys of milesial behind 'module.'
    """
    report, values = plan(model, source, format=format, reinit_classifier=reinit_classifier)
    if not report.complete:
        if strict:
            raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: {report}")
        warnings.warn(f"{type(model).__name__}: {report}", stacklevel=2)
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)
    return report


def plan(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    format: str | None = None,
    reinit_classifier: bool = False,
) -> tuple[Report, dict[str, Tensor]]:
    """What :func:`load` would do, and the tensors by the model's keys; the model may be on meta."""
    if isinstance(source, Mapping):
        from ._files import _unwrap

        entries, about = _unwrap(source), About()
    else:
        entries, about = read(source)
    own = model.state_dict()
    best = _best(model, own, entries, format)
    report = Report(
        best.format.name, best.equivalent, best.prefix, best.format.preprocessing, about
    )
    values: dict[str, Tensor] = {}
    patterns = _classifier(model)
    for key, like in own.items():
        row = best.found.get(key)
        may_differ = reinit_classifier and fits(patterns, key)
        if row is None:
            if key.endswith(COUNTER) or fits(best.format.optional, key):
                report.kept.append(key)
            else:
                (report.reinitialized if may_differ else report.missing).append(key)
            continue
        rule, name = row
        value = _transforms.read(rule.how, name, best.tensors, like.shape)
        if value.shape != like.shape:
            if may_differ:
                report.reinitialized.append(key)
            else:
                report.mis_shaped.append((key, tuple(value.shape), tuple(like.shape)))
        elif value.is_complex() and not like.is_complex():
            raise CheckpointError(f"{key} must hold real numbers, got {value.dtype}")
        else:
            values[key] = value
            report.loaded.append(key)
    _sort_rest(model, best, report)
    return report, values


def convert(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, *, to_format: str
) -> dict[str, Tensor]:
    """The weights of a model under the keys of a published format.

    What the format has beyond the model's weights (fixed bilinear filters, Caffe's divisor of the
    statistics) is added, and counts of batches that it lacks are left out: :func:`load` of the
    result gives back the same numbers.

    Args:
        model: Whose class chooses the format.
        state_dict: Its weights, if not those that it holds.
        to_format: One of :func:`formats`.

    Raises:
        CheckpointError: Another format; a key for which it has no place.
    """
    chosen = _named(model, to_format)
    own = model.state_dict() if state_dict is None else state_dict
    prefix = chosen.prefix
    if chosen.prefix_if and not getattr(model, chosen.prefix_if, None):
        prefix = ""
    out: dict[str, Tensor] = {}
    for key, value in own.items():
        row = find(chosen, key, value.shape[0] if value.dim() else 0)
        if row is None:
            if not key.endswith(COUNTER) and not fits(chosen.optional, key):
                raise CheckpointError(f"convert: {to_format} has no place for {key}")
            continue
        rule, names = row
        for name, written in _transforms.write(rule.how, names[0], value.detach()).items():
            out[prefix + name] = written
    classes = int(getattr(model, "num_classes", 0))
    for extra in chosen.extras:
        here = bool(extra.module) and bool(getattr(model, extra.module, False))
        if not here or f"{extra.module}.weight" in own:
            continue
        if extra.what == "bilinear":
            out[prefix + extra.theirs] = _transforms.bilinear(classes, extra.size)
        elif extra.what == "constant":
            out[prefix + extra.theirs] = torch.full((extra.channels,), float(extra.value))
    return out


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to_format: str = "pydense",
    about: About | None = None,
) -> None:
    """Writes a model's weights: PyTorch, ``.safetensors``, ``.caffemodel`` or ``.params``.

    Args:
        model: Of ``pydense.models``, or any with ``to_format="pydense"``.
        path: Its suffix chooses the kind of file.
        to_format: As of :func:`convert`.
        about: What ``pydense predict`` is to know of it; only in ``.safetensors``.
    """
    write(path, convert(model, to_format=to_format), about)


@dataclass
class _Match:
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


def _formats(model: nn.Module | str) -> list[Format]:
    classes = [model] if isinstance(model, str) else [c.__name__ for c in type(model).__mro__]
    for name in classes:
        for family in _FAMILIES:
            if name in family.models:
                return [*family.formats, NATIVE]
    return [NATIVE]


def _classifier(model: nn.Module) -> tuple[str, ...]:
    for family in _FAMILIES:
        if any(c.__name__ in family.models for c in type(model).__mro__):
            return family.classifier
    return ()


def _named(model: nn.Module, name: str) -> Format:
    rows = {format.name: format for format in _formats(model)}
    if name not in rows:
        raise CheckpointError(
            f"format must be one of {', '.join(rows)} for {type(model).__name__}, got {name!r}"
        )
    return rows[name]


def _best(
    model: nn.Module, own: Mapping[str, Tensor], entries: dict[str, Any], name: str | None
) -> _Match:
    rows = [_named(model, name)] if name else [f for f in _formats(model) if f.auto]
    matches = [_match(format, own, entries) for format in rows]
    best = max(matches, key=lambda row: row.score)
    if not best.found:
        raise CheckpointError(
            f"no key of the checkpoint is one of {type(model).__name__} in the formats "
            f"{', '.join(f.name for f in rows)}; it begins with "
            f"{', '.join(_printable(key) for key in [*entries][:3])}"
        )
    same = [
        row.format.name
        for row in matches
        if row is not best and row.score == best.score and row.found == best.found
    ]
    best.equivalent = tuple(same)
    return best


def _match(format: Format, own: Mapping[str, Tensor], entries: dict[str, Any]) -> _Match:
    """The best of all ways to take prefixes off."""
    best: _Match | None = None
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
) -> _Match:
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
            if isinstance(tensors.get(name), Tensor) and _usable(tensors[name]):
                found[key] = (rule, name)
                taken.update(_transforms.used(rule.how, name))
                break
    unused = [name for name in tensors if name not in taken]
    return _Match(format, prefix, tensors, names, found, unused)


def _other_classes(
    format: Format, key: str, names: Sequence[str], tensors: Mapping[str, Any]
) -> list[str]:
    """Keys that differ from the expected ones only in the number of classes in them."""
    row = find(format, key)
    if row is None or row[1] == tuple(names):
        return []
    return [name for name in tensors for template in row[1] if match(template, name) is not None]


def _usable(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _sort_rest(model: nn.Module, best: _Match, report: Report) -> None:
    """Every key of the file that fills nothing is dropped for a reason, or unexpected."""
    checks: dict[str, Callable[[Extra, str, _Match], str | None]] = {
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
            report.unexpected.append(best.names[name])
        else:
            report.dropped.append((best.names[name], why))


def _tensor(name: str, best: _Match) -> Tensor:
    value = best.tensors[name]
    if not isinstance(value, Tensor) or not _usable(value):
        raise CheckpointError(f"{_printable(name)} must be a tensor, got {type(value).__name__}")
    return value


def _is_bilinear(extra: Extra, name: str, best: _Match) -> str:
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


def _is_constant(extra: Extra, name: str, best: _Match) -> str:
    value = _tensor(name, best).float()
    if value.numel() and torch.allclose(value, torch.full_like(value, float(extra.value))):
        return f"the fixed factor {extra.value}"
    raise CheckpointError(f"{name} must be {extra.value} in all channels, as the model has it")


def _is_copy(extra: Extra, name: str, best: _Match) -> str | None:
    places = match(extra.theirs, name)
    assert places is not None
    original = fill(str(extra.value), places)
    if original not in best.tensors:
        return None
    if torch.equal(_tensor(name, best), _tensor(original, best)):
        return f"the same as {original}"
    raise CheckpointError(f"{name} differs from {original}, of which it must be a copy")
