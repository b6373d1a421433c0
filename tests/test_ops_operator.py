# SPDX-License-Identifier: Apache-2.0
"""Calls that go around torch's dispatcher, and calls that are known from before."""

from __future__ import annotations

import pytest
import torch
from _ops import random, same_bits
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from pydense import reference
from pydense.nn import AtrousConv2d
from pydense.ops import _atrous_plan as plans
from pydense.ops import atrous_conv, atrous_conv2d
from pydense.ops._atrous_autograd import (
    depthwise_atrous_conv2d,
    depthwise_atrous_conv2d_weight_gradient,
)
from pydense.ops._dense_autograd import dense_atrous_conv2d, dense_atrous_conv2d_weight_gradient
from pydense.ops._mixed_autograd import mixed_conv2d
from pydense.ops._operator import is_eager
from pydense.ops._winograd_autograd import winograd_atrous_conv2d

OPS = torch.ops.pydense
GEOMETRY = (4, 5, 2, 1, 2, 1)
FORMATS = [torch.contiguous_format, torch.channels_last]


def of(dtype, *shapes):
    return [random(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]


X, GRAD = (2, 3, 4, 5), (2, 2, 4, 5)
# How it is called, the operator, shapes of its tensors, what comes behind them.
CALLS = {
    "depthwise": (
        depthwise_atrous_conv2d,
        OPS.depthwise_atrous_conv2d,
        (X, (3, 1, 3, 3), (3,)),
        (*GEOMETRY, False, True),
    ),
    "depthwise gradient": (
        depthwise_atrous_conv2d_weight_gradient,
        OPS.depthwise_atrous_conv2d_weight_gradient,
        (X, X),
        (3, 3, *GEOMETRY[2:]),
    ),
    "dense": (
        lambda x, weight, bias, *rest: dense_atrous_conv2d(x, weight, None, bias, *rest),
        lambda x, weight, bias, *rest: OPS.dense_atrous_conv2d(x, weight, None, bias, *rest),
        (X, (2, 3, 3, 3), (2,)),
        (*GEOMETRY, False, True),
    ),
    "dense gradient": (
        dense_atrous_conv2d_weight_gradient,
        OPS.dense_atrous_conv2d_weight_gradient,
        (GRAD, X),
        (3, 3, *GEOMETRY[2:]),
    ),
    "mixed": (
        mixed_conv2d,
        OPS.mixed_conv2d,
        (X, (2, 3, 3, 3), (2,)),
        (*GEOMETRY, False, True),
    ),
    "winograd": (
        winograd_atrous_conv2d,
        OPS.winograd_atrous_conv2d,
        ((2, 3, 9, 9), (2, 3, 3, 3), (2,)),
        (1, True, False, 2),
    ),
}


@pytest.mark.parametrize("name", CALLS)
class TestCalls:
    @pytest.mark.parametrize("form", FORMATS)
    def test_as_the_operator(self, name, form):
        """Results, gradients and those of gradients, to the bit."""
        call, operator, shapes, rest = CALLS[name]
        found = []
        for function in (call, operator):
            leaves = of(torch.float32, *shapes)
            leaves = [t.contiguous(memory_format=form) if t.dim() == 4 else t for t in leaves]
            with torch.no_grad():
                alone = function(*leaves, *rest)
            leaves = [t.requires_grad_() for t in leaves]
            out = function(*leaves, *rest)
            assert same_bits(out.detach(), alone) and out.stride() == alone.stride()
            first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)
            found.append([out, *first, *second])
        assert all(map(same_bits, *[[t.detach() for t in row] for row in found]))

    def test_gradcheck(self, name):
        call, _, shapes, rest = CALLS[name]
        leaves = [t.requires_grad_() for t in of(torch.float64, *shapes)]
        if name == "winograd":  # of float64 it is a direct convolution
            rest = (*rest[:1], False, *rest[2:])
        assert gradcheck(lambda *a: call(*a, *rest), leaves)
        assert gradgradcheck(lambda *a: call(*a, *rest), leaves)

    def test_each_gradient_alone(self, name):
        call, operator, shapes, rest = CALLS[name]
        for needed in range(len(shapes)):
            found = []
            for function in (call, operator):
                tensors = of(torch.float32, *shapes)
                tensors[needed].requires_grad_()
                out = function(*tensors, *rest)
                found.append(torch.autograd.grad(out.sin().sum(), tensors[needed])[0])
            assert same_bits(*found)

    def test_traced(self, name):
        """A graph holds the operator, not what it calls."""
        call, _, shapes, rest = CALLS[name]
        graph = make_fx(lambda *a: call(*a, *rest))(*of(torch.float32, *shapes)).graph
        called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert len(called) == 1 and called[0].startswith("pydense.")


class TestWhereItIsEager:
    def test_plain(self):
        assert is_eager()
        with torch.no_grad():
            assert is_eager()
        with torch.inference_mode(), torch.autocast("cpu"):
            assert is_eager()

    def test_modes(self):
        with FlopCounterMode(display=False):
            assert not is_eager()
        with forward_ad.dual_level():
            assert not is_eager()
        assert is_eager()

    def test_transforms(self):
        seen = []

        def see(x):
            seen.append(is_eager())
            return x * 2

        torch.vmap(see)(torch.ones(2))
        torch.func.grad(see)(torch.ones(()))
        make_fx(see)(torch.ones(()))
        torch.jit.trace(see, torch.ones(()), check_trace=False)
        assert seen == 4 * [False]

    def test_compiled(self):
        torch._dynamo.reset()
        assert torch.compile(lambda x: x + is_eager(), backend="eager", fullgraph=True)(
            torch.zeros(())
        ).equal(torch.zeros(()))


class TestAutograd:
    def test_written_in_place(self):
        """As of every operator: what backward needs must not have been written."""
        x, weight = of(torch.float32, X, (2, 3, 3, 3))
        out = mixed_conv2d(x, weight.requires_grad_(), None, *GEOMETRY, False, False)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_saves_what_is_needed(self):
        """The weight for the picture's gradient, and the other way round."""
        saved = []

        def pack(tensor):
            saved.append(tensor)
            return tensor

        x, weight = of(torch.float32, X, (2, 3, 3, 3))
        for of_x, of_weight in ((True, False), (False, True), (True, True)):
            leaves = x.clone().requires_grad_(of_x), weight.clone().requires_grad_(of_weight)
            saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                mixed_conv2d(*leaves, None, *GEOMETRY, False, False)
            expected = [leaves[0]] * of_weight + [leaves[1]] * of_x
            assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]


class TestKnownCalls:
    @pytest.fixture
    def planned(self, monkeypatch):
        """The calls that were looked at."""
        made = []

        def plan_of(*arguments):
            made.append(arguments)
            return plans.plan_of(*arguments)

        monkeypatch.setattr(atrous_conv, "plan_of", plan_of)
        return made

    def test_once(self, planned):
        for seed in (1, 2, 3):
            x, weight, bias = (t + seed for t in of(torch.float32, X, (2, 3, 3, 3), (2,)))
            out = atrous_conv2d(x, weight, bias, dilation=2)
            expected = torch.nn.functional.conv2d(x, weight, bias, padding=2, dilation=2)
            assert torch.equal(out, expected)
        assert len(planned) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda a: a.update(x=a["x"][:, :, :3]),
            lambda a: a.update(x=a["x"][:1]),
            lambda a: a.update(x=a["x"].contiguous(memory_format=torch.channels_last)),
            lambda a: a.update(weight=a["weight"][:1], bias=a["bias"][:1]),
            lambda a: a.update(weight=a["weight"][..., :1]),
            lambda a: a.update(bias=None),
            lambda a: a.update(x=a["x"].double(), weight=a["weight"].double(), bias=None),
            lambda a: a.update(dilation=2),
            lambda a: a.update(padding=(1, 1)),
            lambda a: a.update(stride=2, padding=1),
            lambda a: a.update(activation="relu"),
            lambda a: a.update(winograd_tile=None),
        ],
    )
    def test_others_are_looked_at(self, planned, change):
        names = ("x", "weight", "bias")
        call = dict(zip(names, of(torch.float32, X, (2, 3, 3, 3), (2,)), strict=True))
        atrous_conv2d(**call)
        change(call)
        out = atrous_conv2d(**call)
        assert len(planned) == 2
        call.pop("winograd_tile", None)
        assert torch.allclose(out, reference.atrous_conv2d(**call), atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"dilation": 1.0}, TypeError),
            ({"dilation": (1.0, 1)}, TypeError),
            ({"stride": (1, 1.0)}, TypeError),
            ({"padding": 1.0}, TypeError),
            ({"groups": 1.0}, TypeError),
            ({"winograd_tile": 2.0}, TypeError),
            ({"x": None}, TypeError),
            ({"weight": None}, TypeError),
            ({"bias": 0.0}, TypeError),
            ({"weight": torch.zeros(2, 4, 3, 3)}, ValueError),
            ({"weight": torch.zeros(2, 3, 3, 3).double()}, TypeError),
            ({"weight": torch.zeros(2, 3, 3, 3, device="meta")}, ValueError),
        ],
    )
    def test_bad_ones_stay_bad(self, change, error):
        names = ("x", "weight", "bias")
        call = dict(zip(names, of(torch.float32, X, (2, 3, 3, 3), (2,)), strict=True))
        call |= {"stride": (1, 1), "padding": 1, "dilation": 1, "groups": 1, "winograd_tile": 2}
        for _ in range(2):
            atrous_conv2d(**call)
            with pytest.raises(error, match="atrous_conv2d: "):
                atrous_conv2d(**call | change)

    def test_lists(self, planned):
        x, weight = of(torch.float32, X, (2, 3, 3, 3))
        for _ in range(2):
            atrous_conv2d(x, weight, dilation=[2, 1])
        assert len(planned) == 2

    def test_autocast(self, planned):
        x, weight = of(torch.float32, X, (2, 3, 3, 3))
        assert atrous_conv2d(x, weight).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert atrous_conv2d(x, weight).dtype == torch.bfloat16
        assert atrous_conv2d(x, weight).dtype == torch.float32
        assert len(planned) == 2

    def test_tangents_are_refused(self):
        x, weight = of(torch.float32, X, (2, 3, 3, 3))
        atrous_conv2d(x, weight)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="x must have no tangent"):
                atrous_conv2d(dual, weight)

    def test_training_and_inference(self):
        """The same plan serves both."""
        layer = AtrousConv2d(128, 128, 3, padding=12, dilation=12)
        x = random(1, 128, 40, 40)
        with torch.no_grad():
            alone = layer(x)
        out = layer(x)
        assert out.requires_grad and same_bits(out.detach(), alone)
        out.sum().backward()
        assert layer.weight.grad is not None
        layer.requires_grad_(False)
        assert not layer(x).requires_grad

    def test_not_more_than_so_many(self, planned, monkeypatch):
        monkeypatch.setattr(plans, "_MOST_KNOWN", 3)
        x, weight = of(torch.float32, (1, 3, 4, 5), (2, 3, 3, 3))
        for rate in (1, 2, 3, 4, 4, 1):  # the fourth forgets the first three
            atrous_conv2d(x, weight, dilation=rate)
        assert len(planned) == 5
