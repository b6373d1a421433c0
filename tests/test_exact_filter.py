# SPDX-License-Identifier: Apache-2.0
"""pydense.ops.exact_gaussian_filter against brute force in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from _ops import NORMALIZATIONS, layouts, one_number, random, same_bits, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from pydense import _core, reference
from pydense.ops import exact_gaussian_filter

OPERATOR = torch.ops.pydense.exact_gaussian_filter.default
FLOATS = (torch.float32, torch.float64)


def brute_force(values, features, normalization=None, self_term=True):
    """In float64, by the definition, with the whole kernel matrix."""
    v, f = values.double().flatten(2), features.double().flatten(2)
    kernel = (-0.5 * (f[:, :, :, None] - f[:, :, None, :]).square().sum(1)).exp()
    if not self_term:
        kernel = kernel * (1 - torch.eye(f.shape[2]))
    mass = kernel.sum(2, keepdim=True).clamp(min=1e-20)
    columns = {"before": mass, "symmetric": mass.sqrt()}.get(normalization, torch.ones(1, 1, 1))
    rows = {"after": mass, "symmetric": mass.sqrt()}.get(normalization, torch.ones(1, 1, 1))
    return ((kernel @ (v.transpose(1, 2) / columns)) / rows).transpose(1, 2).view(values.shape)


def error(out, expected):
    return float((out.double() - expected).abs().max())


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dims", [1, 2, 5, 9])
def test_error_in_float32_and_float64(dims, normalization, self_term):
    options = {"normalization": normalization, "self_term": self_term}
    for points, channels in ((130, 3), (600, 21)):
        features, values = random(1, dims, points, seed=dims), random(2, channels, points, seed=10)
        expected = brute_force(values, features, **options)
        floor = 2**-23 * float(expected.abs().max())
        plain = error(reference.exact_gaussian_filter(values, features, **options), expected)
        out = exact_gaussian_filter(values, features, **options)
        assert out.dtype == torch.float32
        assert error(out, expected) <= 2 * plain + floor
        wide = exact_gaussian_filter(values.double(), features.double(), **options)
        assert wide.dtype == torch.float64
        assert error(wide, expected) <= 100 * 2**-29 * floor


@settings(max_examples=60)
@given(
    batch=st.integers(0, 3),
    shared=st.booleans(),
    channels=st.integers(1, 40),
    dims=st.integers(1, 12),
    spatial=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    normalization=st.sampled_from(NORMALIZATIONS),
    self_term=st.booleans(),
    scale=st.floats(0.01, 30),
)
def test_any_shape(batch, shared, channels, dims, spatial, normalization, self_term, scale):
    options = {"normalization": normalization, "self_term": self_term}
    features = scale * random(1 if shared else batch, dims, *spatial, seed=3, dtype=torch.float64)
    values = random(batch, channels, *spatial, seed=4, dtype=torch.float64)
    out = exact_gaussian_filter(values, features, **options)
    assert out.shape == values.shape and out.dtype == torch.float64 and out.is_contiguous()
    if out.numel():
        expected = brute_force(values, features, **options)
        assert error(out, expected) <= 1e-12 * (1 + float(expected.abs().max()))
    single = exact_gaussian_filter(values.float(), features.float(), **options)
    for b in range(batch):
        own = features if shared else features[b : b + 1]
        alone = exact_gaussian_filter(values[b : b + 1].float(), own.float(), **options)
        assert same_bits(single[b : b + 1], alone)


def test_one_point_and_none():
    point = torch.tensor([[[3.0], [-2.0]]])
    assert torch.equal(exact_gaussian_filter(point, point), point)
    assert torch.equal(exact_gaussian_filter(point, point, self_term=False), 0 * point)
    for normalization in ("symmetric", "before", "after"):
        options = {"normalization": normalization, "self_term": False}
        assert torch.equal(exact_gaussian_filter(point, point, **options), 0 * point)
    for shape in ((0, 2, 5), (2, 2, 0), (3, 1, 0, 4)):
        empty = torch.empty(shape)
        assert exact_gaussian_filter(empty, empty, normalization="after").shape == shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 5, 37), (2, 5, 9, 11), (2, 5, 3, 4, 5)])
def test_layouts(shape, dtype):
    values = random(*shape, seed=9, dtype=dtype)
    features = random(2, 3, *shape[2:], seed=10, dtype=dtype)
    expected = exact_gaussian_filter(values, features)
    for name, x in layouts(values):
        before = x.clone()
        out = exact_gaussian_filter(x, features)
        assert same_bits(out, expected) and out.is_contiguous(), name
        assert torch.equal(x, before), name
    for name, f in layouts(features):
        assert same_bits(exact_gaussian_filter(values, f), expected), name
    flat = exact_gaussian_filter(values.flatten(2), features.flatten(2))
    assert same_bits(flat.view(shape), expected)


def test_strides_of_the_operator():
    """No copy is made before it, so it must take all strides itself."""
    values, features = random(3, 4, 50, seed=11), random(3, 2, 50, seed=12)
    expected = OPERATOR(values, features, True)
    for (name, x), (_, f) in zip(layouts(values), layouts(features), strict=True):
        assert same_bits(OPERATOR(x, f, True), expected), name
    one = one_number((3, 4, 50))
    assert same_bits(OPERATOR(one, features, True), OPERATOR(one.contiguous(), features, True))
    same = features[:1].expand(3, 2, 50)
    assert same_bits(OPERATOR(values, same, True), OPERATOR(values, features[:1], True))
    place = one_number((1, 7, 50))  # all points at one place: the sum of all
    total = values.double().sum(2, keepdim=True).expand(3, 4, 50)
    assert error(OPERATOR(values, place, True), total) < 1e-5


def test_far_from_the_origin():
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")) / 4
    values = random(1, 3, 8, 9, seed=13)
    moved = grid + torch.tensor([40000.0, -70000.0]).view(2, 1, 1)
    here, there = (exact_gaussian_filter(values, f.unsqueeze(0)) for f in (grid, moved))
    assert same_bits(here, there)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_and_autocast(dtype):
    values, features = random(2, 3, 50, seed=12).to(dtype), random(2, 4, 50, seed=13)
    wide = exact_gaussian_filter(values.float(), features, normalization="symmetric")
    out = exact_gaussian_filter(values, features, normalization="symmetric")
    assert out.dtype == dtype and same_bits(out, wide.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        again = exact_gaussian_filter(values, features, normalization="symmetric")
        wide_again = exact_gaussian_filter(values.float(), features, normalization="symmetric")
    assert same_bits(again, out) and same_bits(wide_again, wide)


def test_features_of_other_dtypes():
    values, features = random(1, 2, 40), torch.arange(40).view(1, 1, 40)
    expected = exact_gaussian_filter(values, features.float())
    for dtype in (torch.uint8, torch.int64, torch.float64):
        assert same_bits(exact_gaussian_filter(values, features.to(dtype)), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_and_runs(dtype):
    features = 2 * random(2, 5, 40, 33, seed=14, dtype=dtype)
    values = random(2, 5, 40, 33, seed=15, dtype=dtype)
    for f in (features, features[:1]):
        results = []
        for count in (1, 2, 4, 4):
            with threads(count):
                results.append(exact_gaussian_filter(values, f, normalization="symmetric"))
        assert all(same_bits(result, results[0]) for result in results)


ISA_SCRIPT = """
import sys, numpy, torch
from pydense.ops import exact_gaussian_filter
g = torch.Generator().manual_seed(1)
f, v = torch.randn(1, 5, 500, generator=g), torch.randn(2, 13, 500, generator=g)
outs = [exact_gaussian_filter(v.to(t), f.to(t), self_term=False).numpy()
        for t in (torch.float32, torch.float64)]
numpy.savez(sys.argv[1], *outs)
"""


def test_instruction_sets(run_python, tmp_path, monkeypatch):
    """The same bits with fused multiply-add, whatever the vectors' width; else nearly the same."""
    results = {}
    for name in _core.cpu_capabilities():
        monkeypatch.setenv("PYDENSE_CPU_CAPABILITY", name)
        done = run_python("-c", ISA_SCRIPT, str(tmp_path / f"{name}.npz"))
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / f"{name}.npz") as archive:
            results[name] = [archive[key] for key in archive]
    fused = [arrays for name, arrays in results.items() if name != "baseline"]
    for arrays in fused[1:]:
        assert all(map(np.array_equal, arrays, fused[0]))
    for arrays in results.values():
        for single, tolerance, expected in zip(arrays, (1e-5, 1e-13), fused[0], strict=True):
            np.testing.assert_allclose(single, expected, rtol=0, atol=tolerance)


MEMORY_SCRIPT = """
import resource, torch
from pydense.ops import exact_gaussian_filter
def run(points):
    exact_gaussian_filter(torch.ones(1, 1, points), torch.zeros(1, 1, points))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(100)
print(run(12000) - before)
"""


def test_no_matrix_in_memory(run_python):
    done = run_python("-c", MEMORY_SCRIPT)
    assert int(done.stdout) < 20_000, done.stderr  # kB; the matrix has 576 MB


def test_not_finite():
    values, features = random(1, 2, 100, seed=16), random(1, 3, 100, seed=17)
    clean = exact_gaussian_filter(values, features)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = values.clone()
        spoiled[0, 1, 30] = bad
        out = exact_gaussian_filter(spoiled, features)
        assert same_bits(out[:, 0], clean[:, 0]) and not out[:, 1].isfinite().any()
    spoiled = features.clone()
    spoiled[0, 2, 30] = float("nan")
    assert exact_gaussian_filter(values, spoiled).isnan().all()
    spoiled[0, 2, 30] = float("inf")
    out = exact_gaussian_filter(values, spoiled)
    others = torch.arange(100) != 30
    alone = exact_gaussian_filter(values[..., others], features[..., others])
    assert out[..., 30].isnan().all() and error(out[..., others], alone.double()) < 1e-5


V, F = torch.zeros(2, 3, 4, 5), torch.zeros(2, 2, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((None, F), TypeError, "values must be a tensor, got None"),
        ((V.int(), F), TypeError, "values must be of dtype float32, float64, float16 or bfloat16"),
        ((V[0, 0], F), ValueError, "values must have a shape out of (N, C, P), (N, C, H, W)"),
        ((V[:, :0], F), ValueError, "with C >= 1, got (2, 0, 4, 5)"),
        ((V, F.numpy()), TypeError, "features must be a tensor, got ndarray"),
        ((V, F.to(torch.complex64)), TypeError, "features must hold real numbers, got"),
        ((V, F[:, :0]), ValueError, "features must have shape (N or 1, channels, 4, 5)"),
        ((V, F[..., :4]), ValueError, "features must have shape (N or 1, channels, 4, 5)"),
        ((V, F.flatten(2)), ValueError, "features must have shape (N or 1, channels, 4, 5)"),
        ((V, torch.zeros(3, 2, 4, 5)), ValueError, "with N = 2 for a values of shape"),
        ((V, one_number((1, 4097, 4, 5))), ValueError, "have 1 to 4096 dimensions, got 4097"),
        ((V.to("meta"), F), NotImplementedError, "values must be on the CPU"),
        ((V, F.to("meta")), NotImplementedError, "features must be on the CPU"),
    ],
)
def test_bad_tensors(arguments, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        exact_gaussian_filter(*arguments)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"normalization": "sym"}, ValueError, "must be one of 'symmetric', 'before', 'after'"),
        ({"normalization": True}, ValueError, "normalization must be one of"),
        ({"self_term": 1}, TypeError, "exact_gaussian_filter: self_term must be a bool, got int"),
    ],
)
def test_bad_options(options, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        exact_gaussian_filter(V, F, **options)


@pytest.mark.parametrize(
    ("values", "features", "text"),
    [
        (V, F, "values must have 3 dimensions, got 4"),
        (V[0], F, "features must have 3 dimensions, got 4"),
        (V[0].int(), F[0], "values must be of dtype Float or Double, got Int"),
        (V[0], F[0].double(), "features must be of dtype Float, got Double"),
        (V[0], F[0, :, :, :3], "features must have 5 points as the values have, got 3"),
        (V[0], torch.zeros(2, 2, 5), "features must have 1 or 3 images, got 2"),
        (V[0], torch.zeros(1, 0, 5), "1 to 4096 dimensions, got 0"),
    ],
)
def test_bad_operands(values, features, text):
    with pytest.raises((ValueError, RuntimeError), match="exact_gaussian_filter: .*" + text):
        OPERATOR(values, features, True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    values, features = random(2, 3, 20, dtype=dtype), random(2, 4, 20, seed=1, dtype=dtype)
    opcheck(OPERATOR, (values, features, True))
    opcheck(OPERATOR, (values.transpose(0, 1), features[:1], False))
    opcheck(OPERATOR, (values[:, :, :0], features[:, :, :0], True))


def test_compile():
    torch._dynamo.reset()
    run = torch.compile(
        lambda v, f: exact_gaussian_filter(v, f, normalization="symmetric", self_term=False),
        fullgraph=True,
        backend="aot_eager",
    )
    for shape in ((2, 3, 6, 7), (2, 3, 9, 5), (3, 3, 9, 4)):
        values, features = random(*shape), random(1, 5, *shape[2:], seed=1)
        expected = exact_gaussian_filter(
            values, features, normalization="symmetric", self_term=False
        )
        assert same_bits(run(values, features), expected)
        half = run(values.bfloat16(), features)
        assert half.dtype == torch.bfloat16 and error(half, expected.double()) < 0.1


class Filter(torch.nn.Module):
    def forward(self, values, features):
        return exact_gaussian_filter(values, features, normalization="after")


def test_export():
    batch, height, width = Dim("batch", min=2), Dim("height", min=2), Dim("width", min=2)
    shapes = ({0: batch, 2: height, 3: width}, {2: height, 3: width})
    inputs = (random(2, 3, 6, 7), random(1, 5, 6, 7, seed=1))
    module = export(Filter(), inputs, dynamic_shapes=shapes).module()
    for size in ((2, 3, 6, 7), (4, 3, 11, 5)):
        values, features = random(*size, seed=2), random(1, 5, *size[2:], seed=3)
        assert same_bits(module(values, features), Filter()(values, features))


def test_flops():
    with FlopCounterMode(display=False) as counter:
        exact_gaussian_filter(torch.zeros(2, 3, 10), torch.zeros(2, 5, 10))
        separate = counter.get_total_flops()
        exact_gaussian_filter(torch.zeros(2, 3, 10), torch.zeros(1, 5, 10))
        shared = counter.get_total_flops() - separate
    assert separate == 100 * 2 * (16 + 6)
    assert shared == 100 * (16 + 2 * 6)
