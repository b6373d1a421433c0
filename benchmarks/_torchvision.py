# SPDX-License-Identifier: Apache-2.0
"""torchvision's segmentation models, for benchmarks and tests; pydense itself never needs them."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from types import ModuleType

import torch

_DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def segmentation_models() -> ModuleType | None:
    """``torchvision.models.segmentation``, None where torchvision is not installed.

    The wheels on PyPI are for torch with CUDA: beside torch for the CPU their own operators do not
    load. The models call none of them, so that a declaration is enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    for _ in range(40):
        try:
            return importlib.import_module("torchvision.models.segmentation")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _DECLARED.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    raise RuntimeError("torchvision: it cannot be imported")
