# SPDX-License-Identifier: Apache-2.0
"""Max pooling with stride 1 against torch's own: values, maxima, gradients, torch's tools."""

from __future__ import annotations

import pytest
import torch
from _ops import layouts, one_number, random, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.library import opcheck
from torch.nn.functional import max_pool2d
from torch.utils.flop_counter import FlopCounterMode

from pydense import _core
from pydense.ops import max_pool2d_same

OPS = torch.ops.pydense
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
SIZES = [3, 5, 7, 9, 11, 13]
NAN, INF = float("nan"), float("inf")
# (channels, height, width): small, one pixel, thin, wider than a tile, odd channels, several groups
SHAPES = [(3, 9, 11), (1, 1, 1), (5, 2, 37), (2, 1, 2100), (21, 30, 7), (300, 6, 12), (1, 70, 5)]
# Under the shim, and on a GPU: with vectors and without.
FEW_SHAPES = [(3, 9, 11), (1, 1, 1), (8, 7, 16)]
KINDS = ["normal", "ties", "zeros", "nan", "inf", "all inf"]


def picture(kind, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    some = torch.rand(shape, generator=generator)
    if kind == "ties":
        return x.round().clamp(-1, 1)
    if kind == "zeros":
        return torch.where(some < 0.5, 0.0, -0.0)
    if kind == "nan":
        return torch.where(some < 0.05, NAN, x)
    if kind == "inf":
        return torch.where(some < 0.9, -INF, torch.where(some < 0.95, x, INF))
    if kind == "all inf":
        return torch.full(shape, -INF)
    return x


def torch_pool(x, size):
    return max_pool2d(x, size, 1, size // 2, return_indices=True)


def positions(offsets, size):
    """Offsets as torch's indices."""
    height, width = offsets.shape[2:]
    code = offsets.cpu().long()
    rows = torch.arange(height)[:, None] + (code >> 4) - size // 2
    return rows * width + torch.arange(width) + (code & 15) - size // 2


def exact_gradient(grad, indices):
    """The sums in float64, rounded once."""
    total = torch.zeros(indices.flatten(2).shape, dtype=torch.float64)
    total.scatter_add_(2, indices.flatten(2), grad.double().flatten(2))
    return total.view(grad.shape).to(grad.dtype)


def check(x, size, device="cpu"):
    """Everything to the letter; the gradient in whole numbers, whose sums are exact."""
    expected, indices = torch_pool(x, size)
    x = x.to(device)
    out, offsets = OPS.max_pool2d_same_with_offsets(x, size)
    assert out.stride() == expected.stride() == offsets.stride()
    same = max_pool2d_same(x, size)
    assert same_bits(same.nan_to_num(7), out.nan_to_num(7))
    out = out.cpu()
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert same_bits(out[number], expected[number])
    assert torch.equal(positions(offsets, size), indices)
    grad = (4 * random(*x.shape, seed=5)).round().to(x.dtype)
    addend = (4 * random(*x.shape, seed=6)).round().to(x.dtype)
    own = OPS.max_pool2d_same_backward(grad.to(device), offsets, None, size)
    assert torch.equal(own.cpu(), exact_gradient(grad, indices)) and own.stride() == out.stride()
    own = OPS.max_pool2d_same_backward(grad.to(device), offsets, addend.to(device), size)
    total = exact_gradient(grad.double(), indices) + addend.double()
    assert torch.equal(own.cpu(), total.to(x.dtype))


class TestAgainstTorch:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", SIZES)
    def test_to_the_letter(self, backend, size, dtype, form):
        for shape in FEW_SHAPES if backend.is_cuda_code else SHAPES:
            for kind in KINDS:
                x = picture(kind, 2, *shape).to(dtype).contiguous(memory_format=form)
                check(x, size, backend.device)

    @settings(max_examples=80)
    @given(
        size=st.sampled_from(SIZES),
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 20), st.integers(1, 40), st.integers(1, 90)
        ),
        kind=st.sampled_from(KINDS),
        last=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 9),
    )
    def test_any_shape(self, size, shape, kind, last, dtype, seed):
        form = FORMATS[last]
        check(picture(kind, *shape, seed=seed).to(dtype).contiguous(memory_format=form), size)

    @pytest.mark.parametrize("capability", _core.cpu_capabilities())
    def test_every_instruction_set(self, capability, restore_core):
        torch.ops.pydense._set_cpu_capability(capability)
        for form in FORMATS:
            for dtype in DTYPES:
                for size in (3, 5, 9):
                    for kind in ("ties", "nan", "all inf"):
                        x = picture(kind, 2, 19, 12, 37).to(dtype).contiguous(memory_format=form)
                        check(x, size)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradient_through_autograd(self, backend, dtype):
        """Against float64 at most twice torch's own error."""
        for form in FORMATS:
            x = random(2, 17, 20, 23).to(dtype).contiguous(memory_format=form)
            grad = random(*x.shape, seed=1).to(dtype)
            _, indices = torch_pool(x, 5)
            wide = torch.zeros(2, 17, 20 * 23, dtype=torch.float64)
            wide.scatter_add_(2, indices.flatten(2), grad.double().flatten(2))
            error = []
            for function in (max_pool2d_same, lambda x, k: torch_pool(x, k)[0]):
                leaf = x.to(backend.device, copy=True).requires_grad_()
                function(leaf, 5).backward(grad.to(backend.device))
                assert leaf.grad.dtype == dtype
                error.append(float((leaf.grad.cpu().double().flatten(2) - wide).abs().max()))
            assert error[0] <= 2 * error[1] + 1e-6

    def test_gradcheck(self, backend):
        for form in FORMATS:
            for size in (3, 5, 7):
                x = torch.randperm(2 * 3 * 5 * 6, dtype=torch.float64).view(2, 3, 5, 6) / 9
                x = x.to(backend.device).contiguous(memory_format=form).requires_grad_()

                def run(x, size=size):
                    return max_pool2d_same(x, size)

                assert gradcheck(run, x) and gradgradcheck(run, x)
        on = {"device": backend.device}
        grad = random(1, 2, 4, 5, dtype=torch.float64, **on).requires_grad_()
        addend = random(1, 2, 4, 5, seed=1, dtype=torch.float64, **on).requires_grad_()
        _, offsets = OPS.max_pool2d_same_with_offsets(random(1, 2, 4, 5, **on), 3)
        assert gradcheck(
            lambda g, a: OPS.max_pool2d_same_backward(g, offsets, a, 3), (grad, addend)
        )


class TestPromises:
    def test_layouts(self, backend):
        x = random(2, 5, 6, 7, device=backend.device)
        expected = max_pool2d_same(x)
        grad = random(*x.shape, seed=1, device=backend.device)
        for name, y in layouts(x):
            before = y.clone()
            assert same_bits(max_pool2d_same(y), expected), name
            assert torch.equal(y, before), name
            leaf = y.detach().requires_grad_()
            grads = []
            for _, g in layouts(grad):
                (own,) = torch.autograd.grad(max_pool2d_same(leaf), leaf, g)
                grads.append(own)
            assert all(same_bits(own, grads[0]) for own in grads), name
        x = one_number((2, 20, 4, 5), device=backend.device)
        assert same_bits(max_pool2d_same(x), x.contiguous())

    def test_empty_batch(self, backend):
        x = torch.zeros(0, 3, 4, 5, device=backend.device, requires_grad=True)
        out = max_pool2d_same(x)
        out.sum().backward()
        assert out.shape == x.shape == x.grad.shape

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_threads_and_runs(self, dtype, form):
        x = random(2, 40, 130, 90).to(dtype).contiguous(memory_format=form).requires_grad_()
        grad = random(*x.shape, seed=2).to(dtype)
        results = []
        for count in (1, 2, 4, 4):
            with threads(count):
                out = max_pool2d_same(x)
                results.append((out, *torch.autograd.grad(out, x, grad)))
        for row in results[1:]:
            assert all(map(same_bits, row, results[0]))

    def test_more_than_2_to_the_31_elements(self):
        planes = 2**31 // (64 * 4096) + 1
        one = torch.randn(1, 1, 64, 4096).to(torch.bfloat16)
        with open("/proc/meminfo") as info:
            (line,) = [line for line in info if line.startswith("MemAvailable")]
        if int(line.split()[1]) / 2**20 < 7:
            pytest.skip("needs 7 GiB of free memory")
        out = max_pool2d_same(one.expand(1, planes, 64, 4096), 3)
        assert out.numel() > 2**31
        assert torch.equal(out[:, -1:], max_pool2d_same(one, 3))

    def test_what_is_saved_for_backward(self):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            x = random(1, 3, 8, 9)
            max_pool2d_same(x)
            with torch.no_grad():
                max_pool2d_same(x.requires_grad_())
            assert not saved
            max_pool2d_same(x)
        assert [t.dtype for t in saved] == [torch.uint8] and saved[0].shape == x.shape

    def test_exported_without_gradient(self, backend):
        """The operator alone has a gradient too."""
        x = picture("ties", 1, 4, 9, 9).to(backend.device).requires_grad_()
        grad = random(*x.shape, seed=1, device=backend.device)
        (own,) = torch.autograd.grad(OPS.max_pool2d_same(x, 5), x, grad)
        (theirs,) = torch.autograd.grad(max_pool2d_same(x), x, grad)
        assert same_bits(own, theirs)

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"x": 3}, TypeError, "x must be a tensor, got"),
            ({"x": torch.zeros(1, 2, 3)}, ValueError, "x must have a shape out of"),
            ({"x": torch.zeros(1, 2, 3, 4).int()}, TypeError, "x must be of dtype"),
            ({"x": torch.zeros(1, 2, 0, 4)}, ValueError, "x must have H and W >= 1"),
            ({"kernel_size": 4}, ValueError, "kernel_size must be odd, got 4"),
            ({"kernel_size": 1}, ValueError, r"kernel_size must be in \[3, 13\], got 1"),
            ({"kernel_size": 15}, ValueError, r"kernel_size must be in \[3, 13\], got 15"),
            ({"kernel_size": 2.5}, TypeError, "kernel_size must be an integer"),
            (
                {"x": torch.zeros(1, 2, 3, 4, device="meta")},
                NotImplementedError,
                r"x must be on the CPU or a GPU \(cuda\)",
            ),
        ],
    )
    def test_bad_arguments(self, change, error, text):
        arguments = {"x": torch.zeros(1, 2, 3, 4), "kernel_size": 3, **change}
        with pytest.raises(error, match=rf"max_pool2d_same: {text}"):
            max_pool2d_same(**arguments)

    def test_bad_arguments_of_the_operators(self, backend):
        x = torch.zeros(1, 2, 3, 4, device=backend.device)
        codes = torch.zeros(1, 2, 3, 4, dtype=torch.uint8, device=backend.device)
        for call, text in (
            (lambda: OPS.max_pool2d_same(x, 6), "kernel_size must be odd"),
            (lambda: OPS.max_pool2d_same(x, 2**40), "kernel_size must be odd"),
            (lambda: OPS.max_pool2d_same(x.int(), 5), "x must be of dtype Float"),
            (lambda: OPS.max_pool2d_same(x[0], 5), "x must have 4 dimensions"),
            (lambda: OPS.max_pool2d_same_backward(x, x, None, 5), "offsets must be of dtype Byte"),
            (
                lambda: OPS.max_pool2d_same_backward(x, codes[..., 1:], None, 5),
                "offsets must have 4 elements along axis 3, got 3",
            ),
            (
                lambda: OPS.max_pool2d_same_backward(x, codes, x.half(), 5),
                "addend must be of dtype Float",
            ),
            (
                lambda: OPS.max_pool2d_same_backward(x, codes, x[:, 1:], 5),
                "addend must have 2 elements along axis 1, got 1",
            ),
        ):
            with pytest.raises((ValueError, RuntimeError), match=text):
                call()


class TestTorch:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, backend, dtype, form):
        on = {"device": backend.device, "dtype": dtype}
        x = random(2, 3, 5, 6, **on).contiguous(memory_format=form).requires_grad_()
        opcheck(OPS.max_pool2d_same.default, (x, 5))
        opcheck(OPS.max_pool2d_same_with_offsets.default, (x, 3))
        _, offsets = OPS.max_pool2d_same_with_offsets(x.detach(), 3)
        grad = random(2, 3, 5, 6, seed=1, **on).contiguous(memory_format=form)
        opcheck(OPS.max_pool2d_same_backward.default, (grad.requires_grad_(), offsets, None, 3))
        addend = grad.detach().clone().requires_grad_()
        opcheck(OPS.max_pool2d_same_backward.default, (grad, offsets, addend, 3))

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, backend, compiler):
        torch._dynamo.reset()
        function = torch.compile(max_pool2d_same, fullgraph=True, backend=compiler)
        for form in FORMATS:
            x = picture("ties", 2, 17, 6, 7).to(backend.device).contiguous(memory_format=form)
            assert same_bits(function(x), max_pool2d_same(x))
            x.requires_grad_()
            out, expected = function(x), max_pool2d_same(x)
            assert same_bits(out, expected) and out.stride() == expected.stride()
            grads = (torch.autograd.grad(o.square().sum(), x) for o in (out, expected))
            assert same_bits(*(g for (g,) in grads))

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, backend, strict, tmp_path):
        class Model(torch.nn.Module):
            def forward(self, x):
                return max_pool2d_same(x, 7)

        shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
        x = random(2, 3, 8, 9, device=backend.device)
        program = export(Model(), (x,), dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for size in ((2, 3, 8, 9), (3, 3, 21, 40)):
            x = random(*size, device=backend.device)
            assert same_bits(loaded(x), Model()(x))

    def test_autocast_vmap_flops_tangents(self, backend):
        x = random(5, 2, 3, 6, 7, device=backend.device)
        with torch.autocast(backend.device.type, torch.bfloat16):
            assert same_bits(max_pool2d_same(x[0]), max_pool2d_same(x[0]))
            assert max_pool2d_same(x[0]).dtype == torch.float32
        expected = torch.stack([max_pool2d_same(one) for one in x])
        assert same_bits(torch.vmap(max_pool2d_same)(x), expected)
        assert same_bits(torch.vmap(max_pool2d_same, in_dims=2)(x.movedim(0, 2)), expected)
        with FlopCounterMode(display=False) as counter:
            max_pool2d_same(x[0].requires_grad_()).sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 4 * x[0].numel()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x[0].detach(), x[0].detach())
            with pytest.raises(NotImplementedError, match="x must have no tangent"):
                max_pool2d_same(dual)
