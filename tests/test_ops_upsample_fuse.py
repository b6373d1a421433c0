# SPDX-License-Identifier: Apache-2.0
"""fuse_sum_upsample: values and gradients against float64 and torch's own operators."""

from __future__ import annotations

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import interpolate

from pydense import reference
from pydense.ops import fuse_sum_upsample

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
NAN, INF = float("nan"), float("inf")
SHAPES = [  # sizes of the maps; the output has the first one's
    [(32, 24), (16, 12), (8, 6), (4, 3)],
    [(9, 7), (9, 7), (5, 3)],
    [(12, 40), (12, 20), (5, 40)],
    [(6, 6)],
    [(5, 5), (11, 9), (5, 5), (1, 1), (5, 5)],
]


class TestFuse:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("mode", ["bilinear", "corners", "nearest"])
    @pytest.mark.parametrize("shapes", SHAPES)
    def test_against_torch(self, backend, shapes, mode, relu, dtype, form):
        maps = [
            random(2, 18, *shape, seed=i, device=backend.device)
            .to(dtype)
            .contiguous(memory_format=form)
            for i, shape in enumerate(shapes)
        ]
        size, corners = shapes[0], mode == "corners"
        kind = "nearest" if mode == "nearest" else "bilinear"
        options = {"align_corners": corners} if kind == "bilinear" else {}

        def own(maps):
            return fuse_sum_upsample(maps, size, relu, corners, kind)

        def torchs(maps):
            total = 0
            for x in maps:
                same = tuple(x.shape[2:]) == size
                total = total + (x if same else interpolate(x, size, mode=kind, **options))
            return total.relu() if relu else total

        grad = random(2, 18, *size, seed=9, device=backend.device).to(dtype)
        grad = grad.contiguous(memory_format=form)
        results = {}
        for name, run, kind_of in (
            ("exact", torchs, torch.float64),
            ("torch", torchs, dtype),
            ("own", own, dtype),
        ):
            leaves = [x.to(kind_of).detach().clone().requires_grad_() for x in maps]
            out = run(leaves)
            # The mask of the ReLU is a rounding away from being another one.
            safe = torch.where(torchs([x.double() for x in maps]).abs() < 0.1, 0, grad.double())
            out.backward((safe if relu else grad).to(kind_of))
            results[name] = [out.detach(), *[x.grad for x in leaves]]
        eps = torch.finfo(dtype).eps
        for exact, theirs, mine in zip(*results.values(), strict=True):
            own_error = float((mine.double() - exact).abs().max())
            torch_error = float((theirs.double() - exact).abs().max())
            floor = 1e-6 if dtype == torch.float64 else 2 * eps
            assert own_error <= 2 * torch_error + floor
        assert results["own"][0].is_contiguous(memory_format=form)

    @pytest.mark.small
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("corners", [False, True])
    def test_pictures_that_are_cut(self, corners, relu, form):
        """More than a tile and a chunk of the CPU kernels, whose edges cut cells of every scale."""
        sizes = [(70, 1030), (35, 515), (18, 258), (9, 129)]
        own, theirs = (
            [
                random(1, 2, *size, seed=i, dtype=torch.float64)
                .contiguous(memory_format=form)
                .requires_grad_()
                for i, size in enumerate(sizes)
            ]
            for _ in range(2)
        )
        wanted: torch.Tensor = theirs[0]
        for x in theirs[1:]:
            wanted = wanted + interpolate(x, sizes[0], mode="bilinear", align_corners=corners)
        wanted = wanted.relu() if relu else wanted
        out = fuse_sum_upsample(own, sizes[0], relu, corners)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)
        # Where the sum is almost 0, the ReLU's mask is a rounding away from being another one.
        grad = random(1, 2, *sizes[0], seed=9, dtype=torch.float64)
        grad = grad.masked_fill(out.detach() < 1e-9, 0).contiguous(memory_format=form)
        for x, y in zip(
            *(torch.autograd.grad(*p, grad) for p in ((out, own), (wanted, theirs))), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("mode", ["bilinear", "nearest"])
    def test_against_the_reference(self, backend, mode):
        on = {"dtype": torch.float64, "device": backend.device}
        maps = [random(1, 3, *shape, **on) for shape in SHAPES[4]]
        for relu in (False, True):
            out = fuse_sum_upsample(maps, 20, relu, mode=mode)
            expected = reference.fuse_sum_upsample(maps, 20, relu, mode=mode)
            assert (out - expected).abs().max() < 1e-12

    def test_nearest_is_torchs(self, backend):
        """The same index everywhere, also where the product of step and index is rounded."""
        for dtype in DTYPES:  # all in float32, float64 too: 14 -> 46 is one that tells
            for n in range(1, 70):
                x = torch.arange(n, dtype=dtype).view(1, 1, 1, n)
                for out in range(1, 70):
                    own = fuse_sum_upsample([x.to(backend.device)], (1, out), mode="nearest").cpu()
                    assert torch.equal(own, interpolate(x, size=(1, out), mode="nearest"))

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("relu", [False, True])
    def test_gradcheck(self, backend, relu, form):
        maps = [
            random(1, 2, *shape, seed=i, dtype=torch.float64, device=backend.device)
            .contiguous(memory_format=form)
            .requires_grad_()
            for i, shape in enumerate([(6, 5), (3, 3), (6, 5), (2, 5)])
        ]

        def run(*maps):
            return fuse_sum_upsample(list(maps), relu=relu)

        assert gradcheck(run, maps) and gradgradcheck(run, maps)

    def test_gradients_that_nobody_wants(self, backend):
        maps = [random(1, 2, n, n, device=backend.device) for n in (4, 2, 4)]
        for wanted in ([0], [1], [2], [0, 2], [1, 2]):
            for relu in (False, True):
                leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(maps)]
                fuse_sum_upsample(leaves, relu=relu).sum().backward()
                assert [x.grad is not None for x in leaves] == [i in wanted for i in range(3)]

    def test_nan_passes_the_relu(self, backend):
        x = torch.tensor([[[[NAN, -1.0, 2.0, INF]]]], device=backend.device).expand(1, 3, 1, 4)
        out = fuse_sum_upsample([x, x.new_zeros(1, 3, 1, 2)], relu=True).cpu()
        assert torch.equal(out.nan_to_num(9.0, INF), torch.tensor([9.0, 0, 2, INF]).expand_as(out))
