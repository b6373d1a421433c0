# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint into a model, and writing one as others have it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _transforms
from ._errors import CheckpointError, printable
from ._files import About, read, unwrap, write
from ._leftover import missing_constants, sort_rest
from ._match import best_match, classifier_of, formats_of, named, other_options
from ._rules import COUNTER, find, fits

_SHOWN = 8


@dataclass
class Report:
    """What became of every key.

    Attributes:
        format: Name of the key format.
        equivalent: Other formats in which the keys mean the same.
        prefix: What was taken off the keys.
        preprocessing: What the format's networks expect; None where the format does not say.
        source: Where that is read from, or why it is not known.
        about: What the file says of itself.
        loaded: Keys of the model that were filled.
        missing: Keys of the model that the file has not; and numbers of such files without which
            the others mean something else (the divisor of Caffe's statistics, ``scale_pool4.0`` of
            FCN-8s-at-once).
        unexpected: Keys of the file that the model has not.
        mis_shaped: (key of the model, shape in the file, shape in the model).
        reinitialized: Keys of the classifier that were left as the constructor made them.
        kept: Keys of the model that files of this format never have; left as they were.
        dropped: (key of the file, why the model needs none).
        notes: Options in which the model differs from the networks that such files are of.
        options: These options, as the networks have them.
    """

    format: str = ""
    equivalent: tuple[str, ...] = ()
    prefix: str = ""
    preprocessing: str | None = None
    source: str = ""
    about: About = field(default_factory=About)
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mis_shaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    reinitialized: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

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
            ("beside the weights", list(self.about.beside)),
        ):
            if rows:
                more = f", and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
                lines.append(f"{what} ({len(rows)}): {', '.join(rows[:_SHOWN])}{more}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(printable(line) for line in lines)


def formats(model: nn.Module | str) -> list[str]:
    """Names of the key formats that a model (or a class of that name) can be loaded from."""
    return [format.name for format in formats_of(model)]


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
        entries, beside = unwrap(source)
        about = About(beside=beside)
    else:
        entries, about = read(source)
    own = model.state_dict()
    best = best_match(model, own, entries, format)
    report = Report(
        best.format.name,
        best.equivalent,
        best.prefix,
        best.format.preprocessing,
        best.format.source,
        about,
    )
    values: dict[str, Tensor] = {}
    patterns = classifier_of(model)
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
        for other in _transforms.used(rule.how, name)[1:]:
            if other not in best.tensors and other not in report.missing:
                report.missing.append(other)
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
    report.options = other_options(model, best.format)
    report.notes = [
        f"networks of {best.format.name} have {option}={value}, this model has not"
        for option, value in report.options.items()
    ]
    report.missing += missing_constants(model, best)
    report.unexpected, report.dropped = sort_rest(model, best)
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
    chosen = named(model, to_format)
    own = model.state_dict() if state_dict is None else state_dict
    prefix = chosen.prefix
    if chosen.prefix_if and not getattr(model, chosen.prefix_if, None):
        prefix = ""
    options = other_options(model, chosen)

    def hint(key: str) -> str:
        child = key.partition(".")[0]
        if options.get(child) is not False:
            return ""
        return (
            f": its networks have {child}=False, build the model so or give a state_dict without "
            f"{child}.*"
        )

    out: dict[str, Tensor] = {}
    for key, value in own.items():
        row = find(chosen, key, value.shape[0] if value.dim() else 0)
        if row is None:
            if not key.endswith(COUNTER) and not fits(chosen.optional, key):
                raise CheckpointError(f"convert: {to_format} has no place for {key}{hint(key)}")
            continue
        rule, names = row
        entries = _transforms.write(rule.how, names[0], value.detach(), own, key)
        for name, written in entries.items():
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
