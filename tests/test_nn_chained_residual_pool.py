# SPDX-License-Identifier: Apache-2.0
"""RefineNet's blocks: against plain torch, with the parameter names of published checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random, same_bits
from torch import nn
from torch.nn.functional import conv2d, interpolate, max_pool2d

from pydense.nn import (
    ChainedResidualPooling,
    MultiResolutionFusion,
    RefineNetBlock,
    ResidualConvUnit,
    UpsampleConcatConv1x1,
)
from pydense.ops import chained_residual_pool


def double(*shape, seed=0):
    return random(*shape, seed=seed, dtype=torch.float64)


def pooled(x, weights, padding, improved=False):
    total = top = x
    for w in weights:
        if improved:
            top = max_pool2d(conv2d(top, w, padding=padding), 5, 1, 2)
        else:
            top = conv2d(max_pool2d(top, 5, 1, 2), w, padding=padding)
        total = total + top
    return total


def units(x, state, prefix, count):
    for i in range(count):
        own = {k: state[f"{prefix}{i + 1}_conv{k}"] for k in (".weight", ".bias")}
        y = conv2d(x.relu(), own[".weight"], own[".bias"], padding=1).relu()
        x = x + conv2d(y, state[f"{prefix}{i + 1}_conv_relu_varout_dimred.weight"], padding=1)
    return x


@pytest.mark.parametrize(
    ("kernel", "variant"), [(3, "pool_conv"), (3, "conv_pool"), (1, "pool_conv"), (1, "conv_pool")]
)
def test_pooling(kernel, variant):
    """Original, improved and light-weight."""
    block = ChainedResidualPooling(6, 4, kernel, variant).double()
    names = [f"{i}_outvar_dimred.weight" for i in (1, 2, 3, 4)]
    assert list(block.state_dict()) == names
    checkpoint = {name: double(6, 6, kernel, kernel, seed=i) / 9 for i, name in enumerate(names)}
    block.load_state_dict(checkpoint)
    x = double(2, 6, 9, 11, seed=9).relu()
    expected = pooled(x, checkpoint.values(), kernel // 2, variant == "conv_pool")
    assert torch.allclose(block(x), expected, rtol=1e-12, atol=1e-12)
    assert same_bits(copy.deepcopy(block)(x), block(x))
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_pooling_with_bias():
    block = ChainedResidualPooling(3, 2, 1, bias=True, pool_size=3)
    x = random(1, 3, 7, 8)
    first, second = (getattr(block, f"{i}_outvar_dimred") for i in (1, 2))
    expected = chained_residual_pool(
        x, [first.weight, second.weight], [first.bias, second.bias], pool_size=3
    )
    assert same_bits(block(x), expected)
    assert "variant='pool_conv', pool_size=3" in repr(block)


def test_residual_units():
    block = ResidualConvUnit(5, 2).double()
    assert list(block.state_dict()) == [
        "1_conv.weight",
        "1_conv.bias",
        "1_conv_relu_varout_dimred.weight",
        "2_conv.weight",
        "2_conv.bias",
        "2_conv_relu_varout_dimred.weight",
    ]
    x = double(2, 5, 7, 8)
    before = x.clone()
    assert torch.allclose(block(x), units(x, block.state_dict(), "", 2), rtol=1e-12)
    assert torch.equal(x, before)


def test_fusion():
    maps = [double(2, 6, 5, 4), double(2, 4, 10, 9, seed=1), double(2, 8, 3, 3, seed=2)]
    for relu in (False, True):
        block = MultiResolutionFusion([6, 4, 8], relu=relu).double()
        rows = [conv2d(x, c.weight, padding=1) for x, c in zip(maps, block.convs, strict=True)]
        up = [interpolate(r, (10, 9), mode="bilinear", align_corners=True) for r in rows]
        expected = sum(up).relu() if relu else sum(up)
        out = block(maps)
        assert out.shape == (2, 4, 10, 9) and torch.allclose(out, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="maps must be 3, got 2"):
        block(maps[:2])


def network(light, generator):
    """The decoder's part of a checkpoint of refinenet-pytorch, or light-weight, smaller."""
    state = {}

    def put(name, *shape):
        state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) / 6

    k = 1 if light else 3
    for stage in (1, 2):
        c = 6 if stage == 1 else 4
        for i in range(4):
            put(f"mflow_conv_g{stage}_pool.{i + 1}_outvar_dimred.weight", c, c, k, k)
        for name, count in ((f"adapt_stage{stage}_b", 2), (f"mflow_conv_g{stage}_b", 3)):
            for i in range(0 if light else count):
                put(f"{name}.{i + 1}_conv.weight", c, c, 3, 3)
                put(f"{name}.{i + 1}_conv.bias", c)
                put(f"{name}.{i + 1}_conv_relu_varout_dimred.weight", c, c, 3, 3)
    put("mflow_conv_g1_b3_joint_varout_dimred.weight", 4, 6, k, k)
    put("adapt_stage2_b2_joint_varout_dimred.weight", 4, 4, k, k)
    put("p_ims1d2_outl1_dimred.weight", 6, 9, k, k)
    return state


@pytest.mark.parametrize("light", [False, True])
def test_blocks_load_published_checkpoints(light):
    state = network(light, torch.Generator().manual_seed(0))
    options = {"kernel_size": 1, "adapt_units": 0, "output_units": 0} if light else {}
    coarse = RefineNetBlock([6], 6, **options).double()
    fine = RefineNetBlock([4, 6], 4, **options).double()
    coarse.load_published(state, 1)
    fine.load_published(state, 2)
    x4, x3 = double(1, 6, 5, 6), double(1, 4, 10, 12, seed=1)
    out = fine([x3, coarse([x4])])

    padding = 0 if light else 1

    def stage(x, number):
        weights = [
            state[f"mflow_conv_g{number}_pool.{i}_outvar_dimred.weight"] for i in (1, 2, 3, 4)
        ]
        x = pooled(x.relu(), weights, padding)
        return x if light else units(x, state, f"mflow_conv_g{number}_b.", 3)

    def adapt(x, number):
        return x if light else units(x, state, f"adapt_stage{number}_b.", 2)

    x = stage(adapt(x4, 1), 1)
    x = conv2d(x, state["mflow_conv_g1_b3_joint_varout_dimred.weight"], padding=padding)
    x = interpolate(x, (10, 12), mode="bilinear", align_corners=True)
    y = adapt(x3, 2)
    y = conv2d(y, state["adapt_stage2_b2_joint_varout_dimred.weight"], padding=padding)
    expected = stage(x + y, 2)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(RuntimeError, match="Missing key"):
        fine.load_published({}, 2)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("bias", [True, False])
def test_concat_head(bias, mode):
    corners = (False, True) if mode == "bilinear" else (False,)
    for align_corners in corners:
        plain = nn.Conv2d(12, 7, 1, bias=bias).double()
        head = UpsampleConcatConv1x1([3, 4, 5], 7, bias, align_corners, mode).double()
        head.load_state_dict(plain.state_dict())
        maps = [
            double(2, c, 12 >> k, 16 >> k, seed=k).requires_grad_() for k, c in enumerate((3, 4, 5))
        ]
        options = {} if mode == "nearest" else {"align_corners": align_corners}
        for size in ((12, 16), (20, 30)):
            up = [interpolate(x, size, mode=mode, **options) for x in maps]
            expected = plain(torch.cat(up, 1))
            out = head(maps, size)
            assert torch.allclose(out, expected, rtol=1e-6, atol=1e-6)
            grad = double(*out.shape, seed=5)
            own = torch.autograd.grad(out, [*maps, *head.parameters()], grad)
            theirs = torch.autograd.grad(expected, [*maps, *plain.parameters()], grad)
            for a, b in zip(own, theirs, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
        assert head(maps).shape == (2, 7, 12, 16)
    with pytest.raises(ValueError, match=r"maps must have channels \[3, 4, 5\], got \[3, 4\]"):
        head(maps[:2])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ChainedResidualPooling(0), "ChainedResidualPooling: channels must be in"),
        (lambda: ChainedResidualPooling(3, 0), "ChainedResidualPooling: stages must be in"),
        (lambda: ChainedResidualPooling(3, 4, 2), "kernel_size must be 1 or 3, got 2"),
        (lambda: ChainedResidualPooling(3, 4, 1, "x"), "variant must be one of"),
        (lambda: ChainedResidualPooling(3, pool_size=6), "pool_size must be odd, got 6"),
        (lambda: ResidualConvUnit(3, 0), "ResidualConvUnit: units must be in"),
        (lambda: MultiResolutionFusion([]), "in_channels must not be empty"),
        (lambda: RefineNetBlock([4], 5), "in_channels must be several numbers or channels = 5"),
        (lambda: UpsampleConcatConv1x1([], 5), "in_channels must be 1 to 16 numbers"),
        (lambda: UpsampleConcatConv1x1([2], 5, mode="x"), "mode must be one of"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_compiled_blocks():
    torch._dynamo.reset()
    block = RefineNetBlock([4, 6], 4, kernel_size=1, adapt_units=0, output_units=0)
    maps = [random(1, 4, 8, 9), random(1, 6, 4, 5, seed=1)]
    function = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(function(maps), block(maps), atol=1e-5)
