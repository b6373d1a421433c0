# SPDX-License-Identifier: Apache-2.0
"""How a key format is written down: which key of a file is which of a model.

A format is a table of rules from the model's key to the file's. Both are templates: ``{i}``,
``{j}`` and ``{k}`` stand for whole numbers, other names for any text. The file's template may add
to a number, ``{i+1}``, and has the number of classes for ``{classes}``. The first rule that fits a
key counts; the same table serves both directions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

_PLACE = re.compile(r"\{([a-z]+)([+-]\d+)?\}")
_NUMBERS = frozenset("ijk")
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Rule:
    """Which key of a file is one of a model.

    Attributes:
        ours: Template of the model's keys.
        theirs: Templates of the file's, the usual one first.
        how: What is done to the numbers, see ``_transforms``.
    """

    ours: str
    theirs: str | tuple[str, ...]
    how: str = "copy"


SAME = Rule("{p}", "{p}")
"""All other keys are the model's own."""


@dataclass(frozen=True)
class Extra:
    """Keys of a file that a model has no use for.

    Attributes:
        theirs: Template of the keys.
        what: ``"bilinear"``, the fixed filter of a deconvolution, ``"constant"`` and ``"copy"`` are
            verified; ``"unused"`` takes no part in the model.
        value: The constant; the template of the original of a copy; why it is unused.
        module: The model's child (or attribute) without which there is no such key. With it, the
            key is written too.
        size: Of the bilinear filter.
        channels: Of the constant.
    """

    theirs: str
    what: str
    value: float | str = ""
    module: str = ""
    size: int = 0
    channels: int = 0


@dataclass(frozen=True)
class Format:
    """A published key format.

    Attributes:
        name: Of the format.
        rules: From the model's keys to the file's; none where they are the same.
        extras: What else is in files.
        prefix: Written before each key, and stripped when read.
        prefix_if: The model's attribute without which none is written.
        preprocessing: What networks of these files expect, a name of ``PREPROCESSING``; None where
            the format does not say.
        source: Where that is read from, and what else is done to pictures there; or why it is not
            known.
        optional: Templates of the model's keys that files of this format do not have.
        auto: Whether the format is found by the keys, or only when asked for by name.
        suffix: Of files of this format.
        counters: Whether files have batch normalisation's ``num_batches_tracked``.
        options: Options (name and value) of the networks that the files are of, which no key shows
            and which are not the models' defaults. A value may be a function of the model: None
            where it is not known. False for a child of the model means that there is none.
        of: An attribute of the model and its value, if the format is not of all variants.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    extras: tuple[Extra, ...] = ()
    prefix: str = ""
    prefix_if: str = ""
    preprocessing: str | None = None
    source: str = ""
    optional: tuple[str, ...] = ()
    auto: bool = True
    suffix: str = ".pth"
    counters: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    of: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Family:
    """The formats of some models.

    Attributes:
        models: Names of the classes.
        classifier: Templates of the keys whose shape depends on the number of classes.
        formats: Those that are published.
    """

    models: tuple[str, ...]
    classifier: tuple[str, ...]
    formats: tuple[Format, ...]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts, end = [], 0
    for place in _PLACE.finditer(template):
        parts.append(re.escape(template[end : place.start()]))
        name = place[1]
        parts.append(f"(?P<{name}>{'[0-9]+' if name in _NUMBERS else '.+'})")
        end = place.end()
    return re.compile("".join(parts) + re.escape(template[end:]), re.DOTALL)


def match(template: str, key: str) -> dict[str, str] | None:
    """What stands at the template's places in a key, None if it does not fit."""
    found = _pattern(template).fullmatch(key)
    return None if found is None else found.groupdict()


def fits(templates: tuple[str, ...], key: str) -> bool:
    """Whether one of the templates fits."""
    return any(match(template, key) is not None for template in templates)


def fill(template: str, places: dict[str, str]) -> str:
    """The key of a template."""

    def put(place: re.Match[str]) -> str:
        value = places[place[1]]
        return str(int(value) + int(place[2])) if place[2] else value

    return _PLACE.sub(put, template)


def find(format: Format, key: str, outputs: int = 0) -> tuple[Rule, tuple[str, ...]] | None:
    """The rule of a model's key and what the key is called in files, None if they do not have it.

    Args:
        format: Whose rules.
        key: Of the model.
        outputs: Stands for ``{classes}`` in the file's templates; 0 makes a template of the key, in
            which any number fits.
    """
    if key.endswith(COUNTER) and not format.counters:
        return None
    if not format.rules:
        return SAME, (key,)
    for rule in format.rules:
        places = match(rule.ours, key)
        if places is not None:
            places["classes"] = str(outputs) if outputs else "{k}"
            names = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
            return rule, tuple(fill(name, places) for name in names)
    return None
