# SPDX-License-Identifier: Apache-2.0
"""Upsampling as a citizen of torch: opcheck, compile, export, autocast, vmap, FLOP, hooks."""

from __future__ import annotations

import pytest
import torch
from _ops import layouts, random, same_bits
from _ops import one_thread as one_thread
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from pydense.nn import UpsampleCrop
from pydense.ops import (
    dense_crf,
    dense_crf_free_energy,
    dense_crf_steps,
    exact_gaussian_filter,
    fuse_sum_upsample,
    permutohedral_filter,
    upsample_bilinear,
    upsample_crop,
)

OPS = torch.ops.pydense
FORMATS = [torch.contiguous_format, torch.channels_last]


def leaf(*shape, seed=0, dtype=torch.float32, form=torch.contiguous_format, device="cpu"):
    x = random(*shape, seed=seed, device=device).to(dtype)
    return x.contiguous(memory_format=form).requires_grad_()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestOpcheck:
    """Schema, fake tensors with dynamic sizes, autograd registration, AOT dispatch."""

    def test_bilinear(self, backend, dtype, form):
        x = leaf(2, 3, 5, 6, dtype=dtype, form=form, device=backend.device)
        for options in ((False, 0.0, 0.0), (True, 0.0, 0.0), (False, 1.4, 1.5)):
            opcheck(OPS.upsample_bilinear.default, (x, 7, 9, *options))
            opcheck(OPS.upsample_bilinear_backward.default, (x, 3, 2, *options))

    def test_crop(self, backend, dtype, form):
        x = leaf(2, 3, 5, 6, dtype=dtype, form=form, device=backend.device)
        for border in ("zeros", "clamp"):
            options = (2, 3, -0.5, 1.25, border)
            opcheck(OPS.upsample_crop.default, (x, 7, 9, *options))
            opcheck(OPS.upsample_crop_backward.default, (x, 3, 2, *options))

    @pytest.mark.parametrize("relu", [False, True])
    def test_fuse(self, backend, dtype, form, relu):
        options = {"dtype": dtype, "form": form, "device": backend.device}
        maps = [leaf(2, 3, n, n + 1, **options) for n in (8, 4, 8, 2)]
        options = ("bilinear", False)
        opcheck(OPS.fuse_sum_upsample.default, (maps, 8, 9, *options, relu))
        out = maps[2].detach() if relu else None
        sizes = ([8, 4, 2], [9, 5, 3])
        opcheck(OPS.fuse_sum_upsample_backward.default, (maps[0], out, *sizes, *options))


def everything(x, y):
    """All functions, sizes taken from the inputs."""
    up = upsample_bilinear(x, (2 * x.shape[2], x.shape[3] + 3))
    scaled = upsample_bilinear(x, scale_factor=1.5, align_corners=True)
    crop = upsample_crop(x, stride=2, kernel_size=4, offset=1, size=x.shape[2:])
    return up, scaled, crop, fuse_sum_upsample([x, y], relu=True)


def gradients(outputs, inputs):
    return torch.autograd.grad([out.square().sum() for out in outputs], inputs)


class TestCompile:
    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_forward_and_backward_in_one_graph(self, backend, compiler):
        torch._dynamo.reset()
        function = torch.compile(everything, fullgraph=True, backend=compiler)
        for form in FORMATS:
            options = {"form": form, "device": backend.device}
            inputs = leaf(2, 17, 6, 7, **options), leaf(2, 17, 3, 4, seed=1, **options)
            expected, out = everything(*inputs), function(*inputs)
            assert all(map(same_bits, out, expected))
            assert [o.stride() for o in out] == [o.stride() for o in expected]
            pairs = zip(gradients(out, inputs), gradients(expected, inputs), strict=True)
            assert all((a - b).abs().max() < 1e-4 for a, b in pairs)

    def test_sizes_stay_dynamic(self, backend):
        count = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        function = torch.compile(everything, fullgraph=True, backend=count, dynamic=True)
        compilations = []
        for batch, height, width in ((2, 12, 16), (3, 20, 28), (7, 31, 30)):
            inputs = [
                random(batch, 5, height // n, width // n, device=backend.device) for n in (1, 2)
            ]
            assert all(map(same_bits, function(*inputs), everything(*inputs)))
            compilations.append(count.frame_count)
        assert compilations[0] == compilations[-1]

    def test_strides(self, backend):
        torch._dynamo.reset()
        function = torch.compile(lambda x: upsample_bilinear(x, 9), backend="aot_eager")
        for name, x in layouts(random(2, 4, 5, 6, device=backend.device)):
            assert function(x).stride() == upsample_bilinear(x, 9).stride(), name


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_dynamic_sizes(self, backend, strict, tmp_path):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.crop = UpsampleCrop(stride=8, kernel_size=16, offset=31)

            def forward(self, x, image):
                return self.crop(x, image), upsample_bilinear(x, image.shape[2:])

        on = {"device": backend.device}
        x, image = random(2, 3, 8, 9, **on), random(2, 3, 20, 22, **on)
        shapes = (
            {0: Dim("n"), 2: Dim("h", min=2), 3: Dim("w", min=2)},
            {0: Dim("n"), 2: Dim("height", min=2), 3: Dim("width", min=2)},
        )
        program = export(Model(), (x, image), dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for batch, small, large in ((2, (8, 9), (20, 22)), (3, (5, 11), (33, 40))):
            inputs = random(batch, 3, *small, **on), random(batch, 3, *large, **on)
            assert all(map(same_bits, loaded(*inputs), Model()(*inputs)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_keeps_the_dtype(backend, dtype):
    x, y = (random(1, 4, *shape, device=backend.device).to(dtype) for shape in ((8, 9), (4, 5)))
    expected = everything(x, y)
    with torch.autocast(backend.device.type, torch.bfloat16):
        out = everything(x, y)
    assert all(map(same_bits, out, expected)) and all(o.dtype == dtype for o in out)


def test_vmap_folds_into_the_batch(backend):
    x = random(5, 2, 3, 6, 7, device=backend.device)
    for function in (
        lambda x: upsample_bilinear(x, (9, 4)),
        lambda x: upsample_crop(x, stride=2, kernel_size=4, size=(9, 4)),
    ):
        expected = torch.stack([function(one) for one in x])
        assert same_bits(torch.vmap(function)(x), expected)
        moved = x.movedim(0, 2)
        assert torch.equal(torch.vmap(function, in_dims=2)(moved), expected)


def test_vmap_of_maps(backend):
    on = {"device": backend.device}
    x, y = random(5, 2, 3, 6, 7, **on), random(2, 3, 3, 2, seed=1, **on)
    expected = torch.stack([fuse_sum_upsample([one, y], relu=True) for one in x])
    function = torch.vmap(lambda a, b: fuse_sum_upsample([a, b], relu=True), in_dims=(2, None))
    assert same_bits(function(x.movedim(0, 2), y), expected)


EACH = (
    lambda x: upsample_bilinear(x, (9, 4)),
    lambda x: upsample_crop(x, stride=2, kernel_size=4, size=(9, 4)),
    lambda x: fuse_sum_upsample([torch.zeros(1, 2, 8, 8), x]),
    lambda x: dense_crf(x, gaussian={"sxy": 3, "compat": 2}),
    lambda x: dense_crf_free_energy(x.softmax(1), x).kl,
    lambda x: next(iter(dense_crf_steps(x, gaussian={"sxy": 3, "compat": 2}))),
    lambda x: permutohedral_filter(torch.zeros(1, 2, 3, 4), x),
    lambda x: exact_gaussian_filter(x, torch.zeros(1, 2, 3, 4)),
)


@pytest.mark.parametrize("function", EACH)
def test_forward_mode_is_refused(function):
    """torch would drop the tangent without a word, and the result would count as constant."""
    x = random(1, 2, 3, 4)
    text = r"\w+: .* must have no tangent, got one: there is no forward-mode derivative"
    for call in (
        lambda: torch.func.jvp(function, (x,), (x,)),
        lambda: torch.func.jacfwd(function)(x),
        lambda: torch.func.jvp(torch.vmap(function), (x[None],), (x[None],)),
        lambda: torch.func.jvp(
            lambda a: torch.func.jvp(lambda b: function(a) * b, (x,), (x,)), (x,), (x,)
        ),
    ):
        with pytest.raises(NotImplementedError, match=text):
            call()
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=text):
            function(forward_ad.make_dual(x, x))
        # What has no tangent is welcome.
        assert same_bits(function(x), function(x.clone()))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")
    assert same_bits(compiled(x), function(x))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=text):
        compiled(forward_ad.make_dual(x, x))


def test_forward_mode_over_backward_is_refused():
    x, y = leaf(1, 2, 3, 4), leaf(1, 2, 5, 5)
    for out in (upsample_bilinear(x, (9, 4)), fuse_sum_upsample([y, x])):
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(random(*out.shape), random(*out.shape))
            with pytest.raises(NotImplementedError, match="grad must have no tangent"):
                torch.autograd.grad(out, x, grad)


def test_flops():
    x = leaf(2, 3, 10, 12)
    with FlopCounterMode(display=False) as counter:
        out = upsample_bilinear(x, (40, 60))
    # 10 rows are spread to 60 columns, 40 rows of the output are blended: 3 FLOP a number.
    assert counter.get_total_flops() == 2 * 3 * 3 * 60 * (10 + 40)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 3 * 4 * 60 * (40 + 10)
    with FlopCounterMode(display=False) as counter:
        fuse_sum_upsample([out.detach(), x.detach()])
    assert counter.get_total_flops() == 2 * 3 * (40 * 60 + 3 * 60 * (10 + 40))


def test_what_is_saved_for_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x, y = leaf(1, 3, 8, 8), leaf(1, 3, 4, 4)
        upsample_bilinear(x, 16)
        upsample_crop(x, stride=2, kernel_size=4, size=16)
        fuse_sum_upsample([x, y])
        assert not saved
        out = fuse_sum_upsample([x, y], relu=True)
    assert len(saved) == 1 and same_bits(saved[0], out)


def test_gradients_of_maps_of_one_size_are_not_one_tensor_written_twice(backend):
    """They share memory until somebody writes; accumulating must not reach the other."""
    a, b = (leaf(1, 2, 4, 4, seed=seed, device=backend.device) for seed in (0, 1))
    for _ in range(2):
        fuse_sum_upsample([a, b, b], relu=False).sum().backward()
    assert torch.equal(a.grad, torch.full_like(a, 2)) and torch.equal(b.grad, torch.full_like(b, 4))


def test_modified_in_place_is_noticed():
    x, y = leaf(1, 2, 4, 4), leaf(1, 2, 2, 2)
    out = fuse_sum_upsample([x, y], relu=True)
    out.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
