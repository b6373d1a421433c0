# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of dense atrous convolution: under the shim, and on a GPU."""

from __future__ import annotations

import sys

import _backends
import pytest
import torch
from _ops import expansions, layouts, random, same_bits
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_dense_atrous_conv import FORMATS, check, dense, gradients, problem, torchs
from torch.library import opcheck

from pydense import reference
from pydense.nn import AtrousConv2d
from pydense.ops import _aspp_concat_autograd, aspp_concat, atrous_conv2d
from pydense.ops._atrous_dispatch import Choice, Kernels

OPS = torch.ops.pydense
atrous_module = sys.modules[atrous_conv2d.__module__]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# float32 is multiplied in TF32: operands are rounded to 11 bits.
FLOORS = {torch.float32: 2**-10, torch.bfloat16: 2**-8, torch.float16: 2**-10}
# (batch, channels, height, width), outputs, kernel, dilation, padding (top, left, bottom, right):
# rates of the map's size and beyond, one pixel, odd kernels and pairs, several tiles, 1x1.
CASES = [
    ((2, 5, 9, 11), 7, (3, 3), (2, 2), (2, 2, 2, 2)),
    ((1, 24, 17, 17), 32, (3, 3), (6, 6), (6, 6, 6, 6)),
    ((2, 21, 7, 12), 3, (3, 3), (7, 7), (7, 7, 7, 7)),
    ((2, 8, 7, 5), 16, (3, 3), (40, 40), (40, 40, 40, 40)),
    ((3, 4, 1, 1), 5, (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 3, 20, 9), 2, (5, 2), (3, 4), (6, 2, 6, 2)),
    ((2, 6, 5, 6), 16, (2, 3), (2, 2), (7, 0, 7, 0)),
    ((1, 150, 4, 5), 140, (1, 1), (1, 1), (0, 0, 0, 0)),
    ((1, 136, 5, 4), 40, (3, 3), (2, 2), (2, 2, 2, 2)),
]


@pytest.fixture
def backend(cuda_code):
    """What runs CUDA kernels."""
    with _backends.use(cuda_code) as chosen:
        yield chosen


def rows(backend, call):
    """The results under several schedules of the shim, or of several runs."""
    found = []
    for schedule in range(3):
        with _backends.use(backend.name, schedule):
            found.append(call())
    return found


class TestValues:
    @pytest.mark.small
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("case", range(len(CASES)))
    def test_values_and_gradients(self, backend, case, form):
        dtype = DTYPES[(case + (form is FORMATS[1])) % 3]
        check(*CASES[case], dtype, form, device=backend.device, floor=FLOORS[dtype])

    @settings(max_examples=20)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 20)
        ),
        outputs=st.integers(1, 40),
        kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        dilation=st.tuples(st.integers(1, 14), st.integers(1, 25)),
        padding=st.tuples(*[st.integers(0, 14)] * 4),
        dtype=st.sampled_from(DTYPES),
        last=st.booleans(),
        seed=st.integers(0, 9),
    )
    def test_any_shape(self, backend, shape, outputs, kernel, dilation, padding, dtype, last, seed):
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        short = [max(0, r + 1 - n) for r, n in zip(reach, shape[2:], strict=True)]
        padding = (max(padding[0], short[0]), max(padding[1], short[1]), *padding[2:])
        arguments = (shape, outputs, kernel, dilation, padding, dtype, FORMATS[last], seed)
        check(*arguments, device=backend.device, floor=FLOORS[dtype])

    def test_whole_numbers(self, backend):
        """Sums of few whole numbers are exact in every type."""
        for dtype in DTYPES:
            x = random(1, 40, 9, 8, device=backend.device).round().clamp(-2, 2)
            weight = random(24, 40, 3, 3, seed=1, device=backend.device).round().clamp(-1, 1)
            expected = torchs(x, weight, None, (3, 3), (3, 3, 3, 3))
            keep = expected.abs() <= 256  # what bfloat16 holds
            for form in FORMATS:
                own = dense(
                    *(t.to(dtype).contiguous(memory_format=form) for t in (x, weight)),
                    None,
                    (3, 3),
                    (3, 3, 3, 3),
                )
                assert torch.equal(own.float()[keep], expected[keep])

    def test_relu_and_nan(self, backend):
        for form in FORMATS:
            arguments = problem((2, 8, 9, 10), 6, (3, 3), torch.float16, form)
            x, weight, bias = (t.to(backend.device) for t in arguments)
            x[0, 1, 3, 4] = float("nan")
            out = dense(x, weight, bias, (3, 3), (3, 3, 3, 3), relu=True)
            plain = dense(x, weight, bias, (3, 3), (3, 3, 3, 3))
            assert out.isnan().sum() == 9 * 6
            assert torch.equal(out.nan_to_num(7), plain.relu().nan_to_num(7))

    def test_padding_is_not_multiplied(self, backend):
        """Infinite weights meet the map alone."""
        for dtype in DTYPES:
            x, weight, bias = problem((1, 3, 4, 5), 4, (3, 3), dtype, device=backend.device)
            weight[:, :, 0] = float("inf")
            weight[:, :, 1, 0] = float("nan")
            out = dense(x, weight, bias, (5, 5), (5, 5, 5, 5))
            centre = dense(x, weight[:, :, 1:2, 1:2], bias, (1, 1), (0, 0, 0, 0))
            assert torch.equal(out, centre) and bool(out.isfinite().all())

    def test_outputs_without_taps(self, backend):
        """Far in the padding there is the bias alone."""
        x, weight, bias = problem((1, 3, 2, 2), 4, (2, 2), torch.bfloat16, device=backend.device)
        out = dense(x, weight, bias, (1, 1), (20, 20, 20, 20))
        assert torch.equal(out[0, :, 3, 7], bias)
        assert not dense(x, weight, None, (1, 1), (20, 20, 20, 20))[0, :, 30].any()


class TestPromises:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layouts(self, backend, dtype):
        """The same bits from every layout of everything, expanded ones too."""
        x, weight, bias = problem((2, 8, 6, 7), 16, (3, 3), dtype, device=backend.device)
        geometry = ((2, 2), (2, 2, 2, 2))
        grad = random(2, 16, 6, 7, seed=4).to(backend.device, dtype)
        expected = gradients(dense, (x, weight, bias), geometry, grad)
        for (name, y), (_, w), (_, g) in zip(
            layouts(x), layouts(weight), layouts(grad), strict=True
        ):
            leaves = [y.detach().requires_grad_(), w.detach().requires_grad_()]
            out = dense(*leaves, bias, *geometry)
            found = [out.detach(), *torch.autograd.grad(out, leaves, g)]
            assert all(map(same_bits, found, expected)), name
        for name, y in expansions(x):
            assert same_bits(
                dense(y, weight, bias, *geometry), dense(y.contiguous(), weight, bias, *geometry)
            ), name

    def test_runs(self, backend):
        """The same bits from run to run, of sums in parts, too."""
        for dtype in DTYPES:
            arguments = problem((1, 200, 9, 9), 24, (3, 3), dtype, device=backend.device)
            grad = random(1, 24, 9, 9, seed=5).to(backend.device, dtype)
            first, *others = rows(
                backend,
                lambda a=arguments, g=grad: gradients(dense, a, ((4, 4), (4, 4, 4, 4)), g)[:3],
            )
            for other in others:
                assert all(map(same_bits, first, other))

    @pytest.mark.parametrize("form", FORMATS)
    def test_empty_batch(self, backend, form):
        arguments = problem((0, 3, 4, 5), 6, (3, 3), torch.float16, form, device=backend.device)
        grad = torch.zeros(0, 6, 4, 5, dtype=torch.float16, device=backend.device)
        found = gradients(dense, arguments, ((2, 2), (2, 2, 2, 2)), grad)
        assert found[0].shape == (0, 6, 4, 5) and found[1].shape == (0, 3, 4, 5)
        assert not found[2].any() and found[2].shape == (6, 3, 3, 3)

    def test_opcheck(self, backend):
        for form in FORMATS:
            x, weight, bias = (
                t.requires_grad_()
                for t in problem(
                    (2, 3, 5, 6), 4, (3, 3), torch.bfloat16, form, device=backend.device
                )
            )
            opcheck(
                OPS.dense_atrous_conv2d.default,
                (x, weight, None, bias, 5, 6, 2, 2, 2, 2, False, True),
            )
            grad = random(2, 4, 5, 6).to(backend.device, torch.bfloat16).requires_grad_()
            opcheck(OPS.dense_atrous_conv2d_weight_gradient.default, (grad, x, 3, 3, 2, 2, 2, 2))

    def test_compiled(self, backend):
        x, weight, bias = problem((1, 8, 7, 9), 8, (3, 3), torch.bfloat16, device=backend.device)

        def call(x, weight, bias):
            return dense(x, weight, bias, (2, 2), (2, 2, 2, 2), relu=True)

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
        assert same_bits(compiled(x, weight, bias), call(x, weight, bias))

    def test_refused(self, backend):
        x, weight, bias = problem((1, 3, 5, 6), 4, (3, 3), torch.float64, device=backend.device)
        with pytest.raises(
            ValueError, match=r"dense_atrous_conv2d: x must be of dtype Float .*TF32"
        ):
            dense(x, weight, bias, (2, 2), (2, 2, 2, 2))
        with pytest.raises(ValueError, match=r"weight_gradient: x must be of dtype Float .*TF32"):
            OPS.dense_atrous_conv2d_weight_gradient(x, x, 3, 3, 2, 2, 2, 2)
        x, weight, bias = (t.half() for t in (x, weight, bias))
        packed = OPS._pack_dense_atrous_weight(weight, False)
        for other in (packed[:-1], packed[None], packed.repeat(2), packed.repeat(2)[::2]):
            with pytest.raises(ValueError, match="dense_atrous_conv2d: packed must be what _pack"):
                dense(x, weight, bias, (2, 2), (2, 2, 2, 2), packed=other)
        with pytest.raises(ValueError, match="_pack_dense_atrous_weight: x must be of dtype Float"):
            OPS._pack_dense_atrous_weight(weight.double(), False)


class TestPacked:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits(self, backend, dtype, form):
        """Of a weight that is laid out once and in every call; of one read in place, too."""
        for channels in (5, 16):
            shape, pads = (2, channels, 7, 9), (3, 3, 3, 3)
            x, weight, bias = problem(shape, 21, (3, 3), dtype, form, device=backend.device)
            for own in (weight, weight.contiguous(memory_format=torch.channels_last)):
                packed = OPS._pack_dense_atrous_weight(own, False)
                assert packed.shape == (9 * 21 * -(-channels * x.itemsize // 16) * 16,)
                given = dense(x, weight, bias, (3, 3), pads, packed=packed)
                assert same_bits(given, dense(x, weight, bias, (3, 3), pads))

    def test_that_one_is_read(self, backend):
        x, weight, _ = problem((1, 8, 5, 6), 4, (3, 3), torch.float16, device=backend.device)
        packed = OPS._pack_dense_atrous_weight(-weight, False)
        own = dense(x, weight, None, (2, 2), (2, 2, 2, 2), packed=packed)
        assert same_bits(own, -dense(x, weight, None, (2, 2), (2, 2, 2, 2)))

    def test_branches(self, backend):
        """Some packed, one as it is."""
        x = random(2, 13, 9, 8).to(backend.device, torch.bfloat16)
        weights = [random(6, 13, k, k, seed=k).to(x) for k in (1, 3, 5)]
        found = []
        for packs in (False, True):
            empty = torch.empty(0, dtype=torch.uint8, device=backend.device)
            packed = [OPS._pack_dense_atrous_weight(w, False) for w in weights[:2]] + [empty]
            out = torch.zeros(2, 18, 9, 8, dtype=x.dtype, device=x.device)
            OPS._dense_atrous_conv2d_branches_into(
                x, weights, packed if packs else [], [], [], out, [1, 3, 2], False
            )
            found.append(out)
        assert same_bits(*found) and bool(found[0].any())

    def test_kept_by_a_layer(self, backend, monkeypatch):
        """Laid out once in eval mode; a layer whose weight is read in place keeps none."""
        dense_kernels = Choice(Kernels.DENSE, "for this test")
        monkeypatch.setattr(atrous_module, "choose", lambda call: dense_kernels)
        layer = AtrousConv2d(12, 9, 3, padding=3, dilation=3).to(backend.device).half().eval()
        layer.winograd_tile = None
        x = random(1, 12, 8, 9).to(backend.device, torch.float16)
        with torch.no_grad():
            first = layer(x)
            (_, kept, _) = layer.weight_cache()._kept
            assert kept.device == x.device and kept.shape == (9 * 9 * 16 * 2,)
            assert same_bits(layer(x), first) and layer.weight_cache()._kept[1] is kept
            layer.weight.neg_()
            bias = layer.bias[:, None, None]
            assert torch.allclose(layer(x) - bias, bias - first, atol=1e-2)
            assert layer.weight_cache()._kept[1] is not kept
        assert layer(x).requires_grad and layer.weight_cache()._kept is None

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
    def test_a_captured_step_keeps_none(self, monkeypatch):
        """Replays of a graph write the weight, which nothing counts."""
        dense_kernels = Choice(Kernels.DENSE, "for this test")
        monkeypatch.setattr(atrous_module, "choose", lambda call: dense_kernels)
        layer = AtrousConv2d(12, 9, 3, padding=3, dilation=3, bias=False).cuda().half()
        x = random(1, 12, 8, 9).to("cuda", torch.float16)

        def step():
            (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
            with torch.no_grad():
                layer.weight.sub_(gradient, alpha=0.01)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(2):
            graph.replay()
            with torch.no_grad():
                assert same_bits(layer(x), dense(x, layer.weight, None, (3, 3), (3, 3, 3, 3)))


class TestInto:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_slices(self, backend, dtype):
        """A part of the channels of a picture of any format, and nothing else of it."""
        for form in FORMATS:
            arguments = problem((2, 5, 9, 7), 21, (3, 3), dtype, form, device=backend.device)
            x, weight, bias = arguments
            scale = 1 + random(21, seed=7, device=backend.device)
            exact = torchs(x.double(), weight.double(), None, (4, 4), (4, 4, 4, 4))
            exact = (exact * scale[:, None, None] + bias.double()[:, None, None]).relu()
            for target in FORMATS:
                out = torch.full((2, 40, 9, 7), 7.0, device=backend.device).to(dtype)
                out = out.contiguous(memory_format=target)
                OPS._dense_atrous_conv2d_branches_into(
                    x, [weight], [], [scale], [bias], out[:, 3:24], [4], True
                )
                bound = 2 * FLOORS[dtype] * float(exact.abs().max())
                assert (out[:, 3:24].double() - exact).abs().max() <= bound
                assert (out[:, :3] == 7).all() and (out[:, 24:] == 7).all()

    def test_any_stride(self, backend):
        x, weight, bias = problem((1, 4, 5, 6), 3, (3, 3), torch.float16, device=backend.device)
        expected = dense(x, weight, bias, (2, 2), (2, 2, 2, 2))
        for out in (torch.zeros(1, 3, 6, 5).mT, torch.zeros(1, 6, 5, 12)[:, ::2, :, ::2]):
            own = out.to(backend.device, torch.float16)
            OPS._dense_atrous_conv2d_branches_into(x, [weight], [], [], [bias], own, [2], False)
            assert same_bits(own, expected)


class TestConcat:
    @pytest.fixture(autouse=True)
    def own(self, monkeypatch):
        """pydense's kernels, whatever the rule says."""
        choice = Choice(Kernels.DENSE, "for this test")
        monkeypatch.setattr(_aspp_concat_autograd, "choose_branch", lambda *_: choice)

    @pytest.mark.small
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values_and_gradients(self, backend, dtype, form):
        """More branches than a launch has, too."""
        rates = (1, 2, 5, 9)
        for outputs in ((8, 3, 16, 7), (4, 2, 1) * 3):
            every = (rates * 3)[: len(outputs)]
            x = random(2, 16, 6, 5).to(backend.device, dtype).contiguous(memory_format=form)
            weights = [
                (random(o, 16, *[1 if r == 1 else 3] * 2, seed=o + r) / 8).to(backend.device, dtype)
                for o, r in zip(outputs, every, strict=True)
            ]
            scales = [1 + 0.1 * random(o, seed=2, device=backend.device) for o in outputs]
            biases = [random(o, seed=3, device=backend.device) for o in outputs]
            grad = random(2, sum(outputs), 6, 5, seed=4).to(backend.device, dtype)
            found = []
            for function, kind in ((aspp_concat, dtype), (reference.aspp_concat, torch.float64)):
                leaves = [t.detach().to(kind).requires_grad_() for t in (x, *weights)]
                factors = [
                    [t.double() if kind == torch.float64 else t for t in row]
                    for row in (scales, biases)
                ]
                out = function(leaves[0], leaves[1:], every, scales=factors[0], biases=factors[1])
                found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))])
            for a, e in zip(*found, strict=True):
                assert a.dtype == dtype
                limit = 4 * FLOORS[dtype] * float(e.abs().max())
                assert float((a.double() - e).abs().max()) <= limit

    def test_one_launch(self, backend):
        """Of all branches: one of products, and what lies out x and the weights."""
        if backend.name != "simt":
            return
        x = random(1, 16, 6, 5).half().contiguous(memory_format=FORMATS[1])
        weights = [
            random(8, 16, k, k, seed=k).half().contiguous(memory_format=FORMATS[1])
            for k in (1, 3, 3, 3)
        ]
        before = _backends.simt_launches()
        aspp_concat(x, weights, (1, 2, 3, 4), activation="relu")
        assert _backends.simt_launches() == before + 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
class TestPublicFunctions:
    """What users call, on a GPU, with the kernels that the rule chooses."""

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_convolution(self, dtype, form):
        x, weight, bias = problem(
            (2, 128, 33, 33), 128, (3, 3), dtype, form, device=torch.device("cuda")
        )
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        out = atrous_conv2d(*leaves, dilation=12, activation="relu")
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = torchs(*wide, (12, 12), (12, 12, 12, 12)).relu()
        grad = random(*out.shape, seed=3).cuda()
        own = torch.autograd.grad(out, leaves, grad.to(out))
        theirs = torch.autograd.grad(exact, wide, grad.double())
        for a, e in zip((out, *own), (exact, *theirs), strict=True):
            limit = 4 * FLOORS[dtype] * float(e.abs().max())
            assert float((a.double() - e).abs().max()) <= limit
