# SPDX-License-Identifier: Apache-2.0
"""Winograd's atrous convolutions: values, error, gradients, layouts, promises, the rule."""

from __future__ import annotations

import pytest
import torch
from _ops import layouts, random, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from pydense import _core
from pydense.ops import _winograd as rule
from pydense.ops import _winograd_autograd as _registers
from pydense.ops._memory_format import empty_picture

OP = _registers._OPS.winograd_atrous_conv2d
FORMATS = [torch.contiguous_format, torch.channels_last]
# (batch, channels, height, width), outputs, rate.
CASES = [
    ((2, 5, 9, 11), 3, 2),
    ((1, 70, 33, 33), 37, 6),
    ((3, 4, 17, 8), 33, 1),
    ((1, 3, 1, 1), 2, 1),
    ((1, 6, 12, 40), 5, 12),
    ((2, 3, 7, 5), 4, 40),
]


def problem(shape, outputs, form=FORMATS[0], seed=0, flipped=False):
    x = random(*shape, seed=seed).contiguous(memory_format=form)
    size = (shape[1], outputs) if flipped else (outputs, shape[1])
    weight = random(*size, 3, 3, seed=seed + 1) * (9 * shape[1]) ** -0.5
    return x, weight, random(outputs, seed=seed + 2)


def kernel(x, weight, bias, rate, relu, flipped, tile):
    """The kernel, whatever the size."""
    outputs = weight.shape[1 if flipped else 0]
    out = empty_picture(x, *x.shape[2:], channels=outputs)
    torch.ops.pydense._winograd_atrous_conv2d(out, x, weight, bias, rate, relu, flipped, tile)
    return out


def exact(x, weight, bias, rate, relu, flipped):
    """In float64."""
    x, weight = x.double(), weight.double()
    out = conv2d(
        x, weight.transpose(0, 1).flip(2, 3) if flipped else weight, padding=rate, dilation=rate
    )
    if bias is not None:
        out = out + bias.double()[:, None, None]
    return out.relu() if relu else out


def check(shape, outputs, rate, form, tile, seed=0):
    for flipped in (False, True):
        x, weight, bias = problem(shape, outputs, form, seed, flipped)
        for some, relu in ((bias, True), (bias, False), (None, True)):
            own = kernel(x, weight, some, rate, relu, flipped, tile)
            wanted = exact(x, weight, some, rate, relu, flipped)
            tolerance = (5e-6 if tile == 2 else 5e-5) * max(1, float(wanted.abs().max()))
            assert float((own - wanted).abs().max()) <= tolerance


def rms(error):
    return float(error.square().mean().sqrt())


@pytest.fixture
def any_size(monkeypatch):
    """No map is too small."""
    monkeypatch.setattr(_registers, "best_tile", lambda *sizes: sizes[-1])


class TestValues:
    @pytest.mark.parametrize("tile", rule.TILES)
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("case", CASES)
    def test_against_float64(self, case, form, tile):
        check(*case, form, tile)

    @settings(max_examples=40)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 30)
        ),
        outputs=st.integers(1, 40),
        rate=st.integers(1, 34),
        tile=st.sampled_from(rule.TILES),
        last=st.booleans(),
        seed=st.integers(0, 9),
    )
    def test_any_shape(self, shape, outputs, rate, tile, last, seed):
        check(shape, outputs, rate, FORMATS[last], tile, seed)

    @pytest.mark.parametrize("capability", _core.cpu_capabilities())
    def test_instruction_sets(self, capability, restore_core):
        torch.ops.pydense._set_cpu_capability(capability)
        for tile in rule.TILES:
            check((2, 37, 9, 14), 41, 2, FORMATS[0], tile)

    @pytest.mark.parametrize("tile", rule.TILES)
    @pytest.mark.parametrize("positive", [False, True])
    @pytest.mark.parametrize(("channels", "size", "rate"), [(256, 65, 2), (512, 33, 6)])
    def test_error_on_average(self, channels, size, rate, positive, tile):
        """Beside a direct convolution's: within what is documented, also of what ReLU made."""
        x, weight, *_ = problem((1, channels, size, size), 48)
        x = x.relu() if positive else x
        wanted = exact(x, weight, None, rate, False, False)
        own = kernel(x, weight, None, rate, False, False, tile)
        theirs = conv2d(x, weight, padding=rate, dilation=rate)
        assert rms(own - wanted) <= rule.ERROR[tile] * rms(theirs - wanted)

    @pytest.mark.parametrize("tile", rule.TILES)
    def test_small_maps_are_convolved_directly(self, tile):
        """The same result; sizes decide, inside the operator."""
        x, weight, bias = problem((1, 8, 33, 33), 5)
        for rate in (2, 6, 18, 32):
            for some in (bias, None):
                for flipped in (False, True):
                    w = weight.transpose(0, 1).contiguous() if flipped else weight
                    out = OP(x, w, some, rate, True, flipped, tile)
                    wanted = exact(x, w, some, rate, True, flipped)
                    assert torch.allclose(out.double(), wanted, atol=5e-5)
        assert rule.best_tile(1, 33, 33, 18, tile) is None
        assert rule.best_tile(1, 65, 65, 2, tile) == tile


@pytest.mark.usefixtures("any_size")
class TestGradients:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("flipped", [False, True])
    def test_against_float64(self, form, relu, flipped):
        rate = 3
        x, weight, bias = problem((2, 6, 20, 22), 5, form, flipped=flipped)
        leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        grad = random(2, 5, 20, 22, seed=9).contiguous(memory_format=form)
        out = OP(x, weight, bias, rate, relu, flipped, 2)
        own = torch.autograd.grad(out, leaves, grad)
        wanted = torch.autograd.grad(
            exact(x, weight, bias, rate, relu, flipped), leaves, grad.double()
        )
        for a, b in zip(own, wanted, strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
        assert own[0].is_contiguous(memory_format=form)

    @pytest.mark.parametrize("needed", range(1, 8))
    def test_some_alone(self, needed):
        x, weight, bias = problem((1, 4, 9, 10), 3)
        leaves = [t for bit, t in ((1, x), (2, weight), (4, bias)) if needed & bit]
        for leaf in leaves:
            leaf.requires_grad_()
        own = torch.autograd.grad(OP(x, weight, bias, 2, False, False, 2).sum(), leaves)
        wanted = torch.autograd.grad(exact(x, weight, bias, 2, False, False).sum(), leaves)
        for a, b in zip(own, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-4)

    def test_second_derivatives(self):
        x, weight, *_ = problem((1, 3, 12, 12), 4)
        leaves = [x.requires_grad_(), weight.requires_grad_()]

        def second(function):
            first = torch.autograd.grad(function().square().sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(f.square().sum() for f in first), leaves)

        own = second(lambda: OP(x, weight, None, 2, False, False, 2))
        wanted = second(lambda: exact(x, weight, None, 2, False, False))
        for a, b in zip(own, wanted, strict=True):
            assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


@pytest.mark.usefixtures("any_size")
class TestPromises:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("tile", rule.TILES)
    def test_threads(self, form, tile):
        x, weight, bias = problem((2, 70, 40, 41), 66, form)
        found = []
        for count in (1, 2, 3):
            with threads(count):
                found += [OP(x, weight, bias, 2, True, False, tile) for _ in range(2)]
        assert all(same_bits(out, found[0]) for out in found[1:])

    def test_layouts(self):
        x, weight, bias = problem((2, 5, 16, 17), 4)
        expected = OP(x, weight, bias, 2, False, False, 2)
        for name, y in layouts(x):
            assert same_bits(OP(y, weight, bias, 2, False, False, 2), expected), name
        for name, w in layouts(weight):
            assert same_bits(OP(x, w, bias, 2, False, False, 2), expected), name

    def test_empty_batch(self):
        x, weight, *_ = problem((0, 3, 8, 9), 2)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        out = OP(x, weight, None, 2, False, False, 2)
        assert out.shape == (0, 2, 8, 9)
        of_x, of_weight = torch.autograd.grad(out.sum(), leaves)
        assert of_x.shape == x.shape and not of_weight.any()

    def test_opcheck(self):
        for form in FORMATS:
            x, weight, bias = problem((2, 3, 8, 9), 2, form)
            rest = (2, True, False, 2)
            for t in (x, weight, bias):
                t.requires_grad_()
            opcheck(OP.default, (x, weight, bias, *rest))
            opcheck(OP.default, (x, weight, None, 1, False, False, 3))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, dynamic):
        torch._dynamo.reset()

        def call(x, weight, bias):
            return OP(x.relu(), weight, bias, 2, True, False, 2)

        function = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for shape in ((2, 3, 8, 9), (1, 3, 14, 11)):
            x, weight, bias = problem(shape, 4)
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            own, eager = (
                [f(*leaves), *torch.autograd.grad(f(*leaves).sum(), leaves)]
                for f in (function, call)
            )
            assert all(map(same_bits, own, eager))

    @pytest.mark.parametrize("flipped", [False, True])
    @pytest.mark.parametrize(("channels", "outputs"), [(5, 3), (37, 70), (32, 64)])
    def test_weight_in_channels_last_is_read_as_it_lies(self, channels, outputs, flipped):
        x, weight, bias = problem((1, channels, 9, 8), outputs, flipped=flipped)
        last = weight.contiguous(memory_format=FORMATS[1])
        for tile in rule.TILES:
            one, other = (kernel(x, w, bias, 2, False, flipped, tile) for w in (weight, last))
            assert same_bits(one, other)

    def test_flop(self):
        x, weight, *_ = problem((2, 3, 8, 9), 4)
        with FlopCounterMode(display=False) as counter:
            OP(x, weight, None, 2, False, False, 2)
        assert counter.get_total_flops() == 2 * 2 * 8 * 9 * 3 * 4 * 9

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"x": torch.zeros(1, 2, 8)}, "x must have 4 dimensions"),
            ({"x": torch.zeros(1, 2, 8, 8).double()}, "x must be of dtype"),
            ({"weight": torch.zeros(3, 3, 3, 3)}, "weight must have 3 outputs, 2 channels"),
            ({"bias": torch.zeros(2)}, r"bias must have shape \(3\)"),
            ({"bias": torch.zeros(3).half()}, "bias must be of dtype"),
            ({"tile": 5}, "tile must be 2, 3 or 4, got 5"),
            ({"rate": 0}, "rate must be 1 or more, got 0"),
            ({"out": torch.zeros(1, 3, 8, 9)}, "out must have the sizes of x"),
            ({"out": torch.zeros(1, 3, 8, 16)[..., ::2]}, "out must be dense"),
        ],
    )
    def test_bad_arguments(self, change, text):
        arguments = {
            "out": torch.zeros(1, 3, 8, 8),
            "x": torch.zeros(1, 2, 8, 8),
            "weight": torch.zeros(3, 2, 3, 3),
            "bias": None,
            "rate": 2,
            "relu": False,
            "flipped": False,
            "tile": 2,
            **change,
        }
        with pytest.raises(ValueError, match=f"_winograd_atrous_conv2d: {text}"):
            torch.ops.pydense._winograd_atrous_conv2d(*arguments.values())


class TestRule:
    def test_without_sizes(self):
        assert rule.winograd_wins(256, 256, 2, torch.float32) == (
            True,
            "Winograd F(2x2, 3x3) on 4 phase grids: 44% of the multiplications, "
            "on maps that are not too small for the rate",
        )
        for tile, least in rule.MIN_CHANNELS.items():
            assert rule.winograd_wins(least, 512, 2, torch.float32, tile)[0]
            assert not rule.winograd_wins(512, least - 1, 2, torch.float32, tile)[0]
        wins, reason = rule.winograd_wins(2048, 21, 6, torch.float32)
        assert not wins and "21 channels" in reason
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            wins, reason = rule.winograd_wins(256, 256, 2, dtype)
            assert not wins and str(dtype) in reason

    @pytest.mark.parametrize("tile", rule.TILES)
    @pytest.mark.parametrize("rate", [1, 2, 3, 7, 12, 40])
    def test_tiles(self, tile, rate):
        """Of every grid as many as cover it."""
        for size in range(1, 45):
            grids = [len(range(phase, size, rate)) for phase in range(min(rate, size))]
            assert rule.phase_tiles(size, rate, tile) == sum(-(-n // tile) for n in grids)

    def test_shares(self):
        """What is left of the work of direct convolutions that skip padding."""
        direct = 9 * (1 - 2 * 2 / (3 * 64)) ** 2 * 64 * 64
        assert rule.share_of_direct(1, 64, 64, 2, 2) == pytest.approx(
            16 * 32 * 32 / direct * (1 + 100 / 1024)
        )
        assert rule.share_of_direct(25, 4, 4, 4, 2) == pytest.approx(16 * (1 + 100 / 400))
        # (size, rate): the tiles that are taken where those up to 2, 3 and 4 are allowed.
        for shape, tiles in (
            ((65, 2), (2, 3, 4)),
            ((65, 4), (2, 3, 4)),
            ((65, 12), (2, 3, 3)),
            ((33, 6), (2, 3, 3)),
            ((33, 12), (None, None, None)),
            ((41, 12), (None, None, 4)),
            ((33, 18), (None, None, None)),
        ):
            size, rate = shape
            found = [rule.best_tile(1, size, size, rate, tile) for tile in rule.TILES]
            assert tuple(found) == tiles, shape
        assert rule.best_tile(1, 17, 17, 1, 2) is None and rule.best_tile(8, 17, 17, 1, 2) == 2
