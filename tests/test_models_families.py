# SPDX-License-Identifier: Apache-2.0
"""What holds for a small network of every family: pictures of any size, no large logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _families import CLASSES, FULL, LOW, small
from _models import filled, picture
from _ops import one_thread as one_thread
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture(autouse=True)
def small_backbones():
    with small():
        yield


@pytest.mark.parametrize("family", [*LOW, *FULL])
def test_tiny_pictures(family):
    """Down to a single pixel; what is smaller than a window of a pool is one window."""
    model = filled((LOW | FULL)[family]())
    for size in ((1, 1), (1, 7), (9, 2), (15, 31)):
        with torch.no_grad():
            logits, labels = model(picture(2, 3, *size)), model.predict(picture(2, 3, *size))
        assert logits.shape == (2, CLASSES, *size) and labels.shape == (2, *size)
        assert logits.isfinite().all() and 0 <= labels.min() <= labels.max() < CLASSES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*LOW, *FULL])
def test_narrow_dtypes(family, dtype):
    """Models of 16 bits run, train, and stay near those of float32.

    Where rounding makes another pixel the largest of its window, SegNet unpools to another place.
    """
    torch.manual_seed(0)
    model = filled((LOW | FULL)[family]())
    x, target = picture(2, 3, 33, 47), torch.randint(CLASSES, (2, 33, 47))
    with torch.no_grad():
        expected = model(x)
    model = model.to(dtype)
    with torch.no_grad():
        got, labels = model(x.to(dtype)), model.predict(x.to(dtype))
    assert got.dtype == dtype and labels.dtype == torch.int64
    bound = (12 if family.startswith("segnet") else 2) * torch.finfo(dtype).eps
    assert (got.float() - expected).abs().mean() < bound * expected.std()
    model.train().loss(x.to(dtype), target).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.dtype == dtype and g.isfinite().all() for g in gradients)


class _Largest(TorchDispatchMode):
    """The most pixels of a tensor that has a channel for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for y in tree_leaves(out):
            if isinstance(y, torch.Tensor) and y.dim() == 4 and y.shape[1] == CLASSES:
                self.pixels = max(self.pixels, y.shape[2] * y.shape[3])
        return out


@pytest.mark.parametrize("family", LOW)
def test_no_logits_of_full_resolution(family):
    """predict() and loss() make none, forward nor backward; forward() does."""
    model = filled(LOW[family]())
    x, target = picture(1, 3, 97, 113), torch.randint(CLASSES, (1, 97, 113))
    options = {"shrink_labels": False} if family.startswith("deeplab v2") else {}
    with _Largest() as seen:
        model.predict(x)
        model.loss(x, target, **options).backward()
    assert 0 < seen.pixels < 97 * 113 / 2
    with _Largest() as seen, torch.no_grad():
        model(x)
    assert seen.pixels == 97 * 113
