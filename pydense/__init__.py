# SPDX-License-Identifier: Apache-2.0
"""Custom kernels for dense per-pixel prediction: segmentation, depth, restoration, heat maps.

Importing this package loads neither torch nor NumPy: what needs them is imported when first used
(PEP 562). ``pydense.densecrf`` works without torch altogether; ``pydense.ops``, ``pydense.nn``,
``pydense.losses``, ``pydense.models`` and ``pydense.reference`` need it.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import checkpoints as checkpoints
    from . import densecrf as densecrf
    from . import losses as losses
    from . import models as models
    from . import nn as nn
    from . import ops as ops
    from . import reference as reference
    from ._explain import explain
    from ._info import build_info, empty_cache, get_num_threads, set_num_threads

__all__ = [
    "__version__",
    "build_info",
    "empty_cache",
    "explain",
    "get_num_threads",
    "set_num_threads",
]

_SUBMODULES = ("checkpoints", "densecrf", "losses", "models", "nn", "ops", "reference")


def __getattr__(name: str) -> Any:
    if name == "explain":
        return importlib.import_module("._explain", __name__).explain
    if name in __all__:
        return getattr(importlib.import_module("._info", __name__), name)
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
