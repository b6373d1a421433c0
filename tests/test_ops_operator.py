# SPDX-License-Identifier: Apache-2.0
"""Calls that go around torch's dispatcher, and calls that are known from before."""

from __future__ import annotations

import pytest
import torch
from _ops import random, same_bits
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pydense.nn import AtrousConv2d
from pydense.ops import _pool_autograd as pools
from pydense.ops import _upsample_autograd as upsampling
from pydense.ops import atrous_conv2d, upsample_bilinear
from pydense.ops._aspp_autograd import aspp_sum
from pydense.ops._aspp_concat_autograd import aspp_concat
from pydense.ops._atrous_autograd import (
    depthwise_atrous_conv2d,
    depthwise_atrous_conv2d_weight_gradient,
)
from pydense.ops._dense_autograd import dense_atrous_conv2d, dense_atrous_conv2d_weight_gradient
from pydense.ops._mixed_autograd import mixed_conv2d
from pydense.ops._operator import is_eager
from pydense.ops._residual_pool_autograd import chained_residual_pool
from pydense.ops._separable_autograd import atrous_separable_conv2d
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
    "separable": (
        atrous_separable_conv2d,
        OPS.atrous_separable_conv2d,
        (X, (3, 1, 3, 3), (3,), (2, 3, 1, 1), (2,)),
        (*GEOMETRY, True, False),
    ),
    "upsample": (
        upsampling.upsample_bilinear,
        OPS.upsample_bilinear,
        (X,),
        (7, 9, False, 0.0, 0.0),
    ),
    "pool": (pools.max_pool2d_same, OPS.max_pool2d_same, (X,), (3,)),
    "pool with offsets": (
        lambda *a: pools.max_pool2d_same_with_offsets(*a)[0],
        lambda *a: OPS.max_pool2d_same_with_offsets(*a)[0],
        (X,),
        (3,),
    ),
    "fuse": (
        lambda a, b, c, *rest: upsampling.fuse_sum_upsample([a, b, c], *rest),
        lambda a, b, c, *rest: OPS.fuse_sum_upsample([a, b, c], *rest),
        ((2, 3, 8, 10), X, (2, 3, 8, 10)),
        (8, 10, "bilinear", False, True),
    ),
    "fuse backward": (
        lambda grad, *rest: upsampling.fuse_sum_upsample_backward(grad, None, *rest)[1],
        lambda grad, *rest: OPS.fuse_sum_upsample_backward(grad, None, *rest)[1],
        ((2, 3, 8, 10),),
        ([2, 4], [3, 5], "nearest", False),
    ),
}
# Without second derivatives.
ONCE = {
    "chain": (
        lambda x, a, b, c, d, *rest: chained_residual_pool(x, [a, b], [c, d], *rest)[0],
        lambda x, a, b, c, d, *rest: OPS.chained_residual_pool(x, [a, b], [c, d], *rest)[0],
        (X, (3, 3, 1, 1), (3, 3, 1, 1), (3,), (3,)),
        (True, 3, True, True),
    ),
    "chain without biases": (
        lambda x, a, b, *rest: chained_residual_pool(x, [a, b], [], *rest)[0],
        lambda x, a, b, *rest: OPS.chained_residual_pool(x, [a, b], [], *rest)[0],
        (X, (3, 3, 1, 1), (3, 3, 1, 1)),
        (False, 5, True, True),
    ),
    "sum of branches": (
        lambda x, a, b, c, d, *rest: aspp_sum(x, [a, b], [c, d], *rest),
        lambda x, a, b, c, d, *rest: OPS.aspp_sum(x, [a, b], [c, d], *rest),
        (X, (2, 3, 3, 3), (2, 3, 3, 3), (2,), (2,)),
        ([1, 2],),
    ),
    "branches": (
        lambda x, a, b, p, *s: aspp_concat(x, [a, b], [], p, s[:3], s[3:6], *s[6:]),
        lambda x, a, b, p, *s: OPS.aspp_concat(x, [a, b], [], p, s[:3], s[3:6], *s[6:]),
        (X, (2, 3, 3, 3), (4, 3, 1, 1), (2, 3, 1, 1), *2 * ((2,), (4,), (2,))),
        ([2, 1], True),
    ),
}


ALL = CALLS | ONCE
# Of which torch knows no batches of gradients: what their backward calls has lists of tensors, or
# flattens.
UNBATCHED = ("separable", "fuse", "fuse backward", *ONCE)


@pytest.mark.parametrize("name", ALL)
class TestCalls:
    @pytest.mark.parametrize("form", FORMATS)
    def test_as_the_operator(self, name, form):
        """Results, gradients and those of gradients, to the bit."""
        call, operator, shapes, rest = ALL[name]
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
            found.append([out, *first])
            of_first = sum(g.cos().sum() for g in first)
            if name in CALLS:
                found[-1] += torch.autograd.grad(of_first, leaves)
                continue
            assert first[0].requires_grad
            with pytest.raises(RuntimeError, match="no autograd formula was registered"):
                torch.autograd.grad(of_first, leaves)
        assert all(map(same_bits, *[[t.detach() for t in row] for row in found]))

    def test_gradcheck(self, name):
        call, _, shapes, rest = ALL[name]
        leaves = [t.requires_grad_() for t in of(torch.float64, *shapes)]
        if name == "winograd":  # of float64 it is a direct convolution
            rest = (*rest[:1], False, *rest[2:])
        assert gradcheck(lambda *a: call(*a, *rest), leaves)
        if name in CALLS:
            assert gradgradcheck(lambda *a: call(*a, *rest), leaves)

    def test_each_gradient_alone(self, name):
        call, operator, shapes, rest = ALL[name]
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
        call, operator, shapes, rest = ALL[name]
        found = []
        for function in (call, operator):
            graph = make_fx(lambda *a, f=function: f(*a, *rest))(*of(torch.float32, *shapes)).graph
            found.append([str(n.target) for n in graph.nodes if n.op == "call_function"])
        assert found[0] == found[1]
        assert [target.startswith("pydense.") for target in found[0]].count(True) == 1

    def test_checkpointed(self, name):
        """Without reentrance no saved tensor may be asked for twice."""
        call, _, shapes, rest = ALL[name]
        leaves = [t.requires_grad_() for t in of(torch.float32, *shapes)]
        found = []
        for out in (checkpoint(call, *leaves, *rest, use_reentrant=False), call(*leaves, *rest)):
            found.append(torch.autograd.grad(out.sin().sum(), leaves))
        assert all(map(same_bits, *found))

    def test_on_the_meta_device(self, name):
        call, operator, shapes, rest = ALL[name]
        tensors = [t.to("meta") for t in of(torch.float32, *shapes)]
        found, wanted = (function(*tensors, *rest) for function in (call, operator))
        assert found.is_meta and found.shape == wanted.shape and found.stride() == wanted.stride()

    def test_batched_gradients(self, name):
        """Of the vmap that ``is_grads_batched`` and ``jacobian(vectorize=True)`` use."""
        call, operator, shapes, rest = ALL[name]
        found = []
        for function in (call, operator):
            leaves = [t.requires_grad_() for t in of(torch.float32, *shapes)]
            out = function(*leaves, *rest)
            grads = random(3, *out.shape, seed=8)
            if name in UNBATCHED:
                with pytest.raises(RuntimeError, match="Batching rule not implemented"):
                    torch.autograd.grad(out, leaves, grads, is_grads_batched=True)
                continue
            found.append(torch.autograd.grad(out, leaves, grads, is_grads_batched=True))
            alone = torch.autograd.grad(function(*leaves, *rest), leaves, grads[1])
            for a, b in zip(found[-1], alone, strict=True):
                torch.testing.assert_close(a[1], b, rtol=1e-4, atol=1e-5)
        assert name in UNBATCHED or all(map(same_bits, *found))


# Winograd's kernels run here: they are not of operators that torch knows to batch or to fake.
LARGE = ((1, 128, 33, 33), (128, 128, 3, 3))


class TestTensors:
    """What is no plain tensor sees the operators."""

    def test_large_batched_gradients(self):
        x, weight = of(torch.float32, *LARGE)
        out = atrous_conv2d(x.requires_grad_(), weight)
        grads = random(2, *out.shape, seed=8)
        (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True)
        (alone,) = torch.autograd.grad(atrous_conv2d(x, weight), x, grads[1])
        torch.testing.assert_close(found[1], alone, rtol=1e-4, atol=1e-3)

    def test_subclasses(self):
        class Kind(torch.Tensor):
            pass

        x, weight = of(torch.float32, *LARGE)
        for kind, other in ((x.as_subclass(Kind), weight), (x, weight.as_subclass(Kind))):
            assert type(atrous_conv2d(kind, other)) is Kind
            assert type(atrous_conv2d(kind, other.clone().requires_grad_())) is Kind

    @pytest.mark.parametrize("shapes", [None, ShapeEnv])
    def test_fakes_outside_of_their_mode(self, shapes):
        mode = FakeTensorMode(shape_env=shapes and shapes())
        x, weight = (mode.from_tensor(t) for t in of(torch.float32, *LARGE))
        out = atrous_conv2d(x, weight.requires_grad_())
        assert type(out) is FakeTensor and out.shape == (1, 128, 33, 33)

    def test_traced_small(self):
        """A graph of a small map serves large ones, too."""
        layer = AtrousConv2d(128, 128, 3, padding=6, dilation=6)
        graph = torch.jit.trace(layer, random(1, 128, 9, 9), check_trace=False).inlined_graph
        assert "pydense::winograd_atrous_conv2d" in str(graph)


class TestFormats:
    @pytest.mark.parametrize(
        ("shape", "strides"),
        [
            ((2, 4, 1, 1), (4, 1, 4, 4)),
            ((2, 4, 1, 1), (4, 1, 1, 1)),
            ((2, 1, 4, 5), (20, 1, 5, 1)),
            ((2, 1, 4, 5), (20, 20, 5, 1)),
            ((1, 4, 1, 5), (20, 1, 20, 4)),
            ((1, 4, 5, 1), (20, 5, 1, 1)),
        ],
    )
    def test_fakes_as_results(self, shape, strides):
        """Where both formats have the same order of elements, too."""
        x = torch.zeros(20 * shape[0]).as_strided(shape, strides)
        weight = torch.zeros(shape[1], 1, 3, 3)
        rest = (5, 6, 1, 1, 3, 3, False, False)
        out = OPS.depthwise_atrous_conv2d(x, weight, None, *rest)
        with FakeTensorMode() as mode:
            fakes = mode.from_tensor(x), mode.from_tensor(weight)
            assert OPS.depthwise_atrous_conv2d(*fakes, None, *rest).stride() == out.stride()

    def test_pooled_and_compiled(self):
        """As image pooling of channels_last maps makes them."""
        torch._dynamo.reset()

        def pool(x):
            return upsample_bilinear(adaptive_avg_pool2d(x, 1), (9, 9)) + x

        x = random(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
        # What was compiled before would not look at the fake again.
        with torch._inductor.config.patch(force_disable_caches=True):
            assert torch.allclose(torch.compile(pool)(x), pool(x), atol=1e-6)


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
        with torch.device("cpu"):
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
