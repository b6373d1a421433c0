# SPDX-License-Identifier: Apache-2.0
"""What the tests of the torch operators share: inputs, memory layouts, threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

NORMALIZATIONS = ("symmetric", "before", "after", None)


def random(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal numbers; those of float32 and float64, and of all devices, are the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def picture(*shape: int, seed: int = 0) -> Tensor:
    """A uint8 image (N, channels, *spatial) with two areas and some noise."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.arange(shape[-1]).expand(shape) >= shape[-1] // 2
    return (40 + 130 * ramp + torch.randint(60, shape, generator=generator)).to(torch.uint8)


def compats(kind: str, labels: int, scale: float = 1.0, seed: int = 7) -> Tensor | float:
    """A compatibility of each form; the matrix is not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "potts":
        return 3.25 * scale
    if kind == "diagonal":
        return scale * (1 + 2 * torch.rand(labels, generator=generator))
    return scale * torch.randn(labels, labels, generator=generator)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of dtype, shape and every bit (NaN and the sign of 0 included)."""
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, two = (x.detach().contiguous().view(raw[x.element_size()]) for x in (a, b))
    return torch.equal(one, two)


# Of those below, by torch's rule: what lies in memory channels last, gaps or not.
CHANNELS_LAST = ("channels last", "half of a wider one")


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers in every memory layout that a caller may bring."""
    yield "contiguous", x.contiguous()
    yield "channels last", x.movedim(1, -1).contiguous().movedim(-1, 1)
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "labels slowest", x.transpose(0, 1).contiguous().transpose(0, 1)
    every_other = x.new_full([2 * n for n in x.shape], float("nan") if x.is_floating_point() else 9)
    view = every_other[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    yield "sliced", view
    padded = x.new_zeros(x.numel() + 3)
    padded[3:] = x.reshape(-1)
    yield "storage offset", padded[3:].view(x.shape)
    flipped_storage = x.movedim(1, -1).contiguous().movedim(-1, 1)[..., ::1]
    wide = torch.cat([flipped_storage, flipped_storage], dim=-1)
    yield "half of a wider one", wide[..., : x.shape[-1]]


def one_number(
    shape: tuple[int, ...], value: float = 0.5, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor of one number in memory, all strides 0."""
    return torch.tensor(value, device=device).expand(shape)


def expansions(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Maps with strides of 0, such as the gradients of sums are: numbers of x, repeated."""
    for name, form in (("contiguous", torch.contiguous_format), ("last", torch.channels_last)):
        own = x.contiguous(memory_format=form)
        yield f"{name}, along rows", own[..., :1].expand(x.shape)
        yield f"{name}, along columns", own[..., :1, :].expand(x.shape)
        yield f"{name}, along channels", own[:, :1].expand(x.shape)
        yield f"{name}, along maps", x[..., 0, 0].contiguous()[..., None, None].expand(x.shape)
        yield f"{name}, along pictures", own[:1].expand(x.shape)
    yield "along everything", x[:1, :1, :1, :1].expand(x.shape)


def rms_error(own: Tensor, exact: Tensor) -> float:
    """Relative to what is exact."""
    return float((own.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: many small calls on a busy machine wait for threads most."""
    with threads(1):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
