# SPDX-License-Identifier: Apache-2.0
"""The published configurations by name."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from ._base import SegmentationModel

_Build = TypeVar("_Build", bound=Callable[..., SegmentationModel])

_MODELS: dict[str, Callable[..., SegmentationModel]] = {}


def register_model(build: _Build) -> _Build:
    """Decorator of a named constructor: puts it into :func:`list_models` under its name."""
    name = build.__name__
    if name in _MODELS:
        raise ValueError(f"register_model: name must be new, got {name!r}")
    _MODELS[name] = build
    return build


def list_models(pattern: str | None = None) -> list[str]:
    """Names of the published configurations, sorted.

    Args:
        pattern: Of the names, with ``*`` and ``?``, such as ``"deeplab*"``; None for all.

    Example:
        >>> from pydense.models import list_models
        >>> list_models("unet*")
        ['unet', 'unet_bilinear']
    """
    return sorted(name for name in _MODELS if pattern is None or fnmatchcase(name, pattern))


def get_model(name: str, **options: Any) -> SegmentationModel:
    """Builds a published configuration: ``get_model("unet", num_classes=2)`` is ``unet(2)``.

    Args:
        name: One of :func:`list_models`.
        **options: Of its constructor.

    Raises:
        ValueError: Another name.
    """
    if name not in _MODELS:
        raise ValueError(f"get_model: name must be one of list_models(), got {name!r}")
    return _MODELS[name](**options)
