# SPDX-License-Identifier: Apache-2.0
"""The fast mode of the exact Gaussian filter, under the shim or on a GPU, against float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from _crf_cuda import difference, kernels, relative
from _ops import NORMALIZATIONS, layouts, picture, random, same_bits
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from pydense.nn import CRFasRNN, DenseCRF, use_operators
from pydense.ops import dense_crf, exact_gaussian_filter

FAST = {"precision": "fast"}


@pytest.fixture(params=["0", "1"], ids=["all cards", "sm_90a"])
def kernel(request, monkeypatch):
    """The kernel for all cards, and its twin: under the shim, and on cards that can run it."""
    monkeypatch.setenv("PYDENSE_EXPERIMENTAL_KERNELS", request.param)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("dims", [1, 3, 5, 8])
def test_fast_mode_against_float64(on_gpu, dims, self_term):
    for points, channels, scale in ((130, 3, 1), (300, 30, 2), (300, 2, 0.3)):
        features = scale * random(1, dims, points, seed=dims) + 50
        values = random(1, channels, points).abs()
        expected = exact_gaussian_filter(values.double(), features.double(), self_term=self_term)
        options = {"self_term": self_term, **FAST}
        out = on_gpu(exact_gaussian_filter, values, features, **options)
        assert out.dtype == torch.float32 and relative(out, expected) <= 1e-3
        every = on_gpu(exact_gaussian_filter, values, features, **options, skip_tolerance=0)
        assert relative(every, expected) <= 1e-3


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("dims", [1, 5, 8])
@pytest.mark.parametrize("extent", [30, 200, 1e6, 3e38])
def test_fast_mode_of_points_that_lie_far_apart(on_gpu, monkeypatch, extent, dims, self_term):
    """128 neighbours of some heaps at any distance, with the largest numbers there are."""
    corners = random(dims, 300, seed=2).sign() * torch.arange(300).remainder(3) / 2
    corners[:, :250] = corners[:, torch.arange(250) % 12]
    features = (extent * corners.double() + random(dims, 300, dtype=torch.float64)).float()[None]
    values = random(1, 3, 300, seed=1).abs()
    expected = exact_gaussian_filter(values.double(), features.double(), self_term=self_term)
    for tolerance, twin in ((None, "0"), (0, "0"), (0, "1")):
        monkeypatch.setenv("PYDENSE_EXPERIMENTAL_KERNELS", twin)
        options = {"skip_tolerance": tolerance, "self_term": self_term, **FAST}
        found = on_gpu(exact_gaussian_filter, values, features, **options)
        assert relative(found, expected) <= 1e-3


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dims", [1, 5, 8])
@pytest.mark.parametrize("extent", [50, 200, 1000])
def test_fast_mode_of_scattered_points(on_gpu, extent, dims):
    """All of one sign, so that no two of them need lie near to their middle."""
    features = extent * torch.special.ndtr(random(1, dims, 300, seed=2))
    values = random(1, 2, 300).abs()
    found = on_gpu(exact_gaussian_filter, values, features, **FAST)
    assert relative(found, exact_gaussian_filter(values.double(), features.double())) <= 1e-3


@pytest.mark.usefixtures("kernel")
def test_fast_mode_with_points_far_from_all_others(on_gpu):
    """Also for blocks of queries that lie near to each other: runs of keys have such points."""
    features, values = random(1, 2, 384), random(1, 2, 384, seed=1).abs()
    features[0, 0, 5], features[0, 0, 9] = -3e38, 3e38
    found = on_gpu(exact_gaussian_filter, values, features, **FAST)
    assert relative(found, exact_gaussian_filter(values.double(), features.double())) <= 1e-3


@pytest.mark.usefixtures("kernel")
def test_fast_mode_of_sharp_kernels(on_gpu):
    features = torch.tensor([[[0.0, 1, 2, 1000, 2000]]])
    options = {"self_term": False, "normalization": "symmetric"}
    found = on_gpu(exact_gaussian_filter, torch.ones(1, 1, 5), features, **options, **FAST)
    expected = exact_gaussian_filter(torch.ones(1, 1, 5), features, **options)
    assert difference(found, expected) < 1e-3
    logits, image = random(1, 4, 20, 20), picture(1, 3, 20, 20)
    options = {"bilateral": {"sxy": 60, "srgb": 0.5, "compat": -1.0}, "backend": "exact"}
    expected = dense_crf(logits, image, iterations=2, **options)
    found = on_gpu(dense_crf, logits, image, iterations=2, **options, **FAST)
    assert difference(found, expected) <= 1e-3


@pytest.mark.usefixtures("kernel")
def test_fast_mode_of_values_that_are_not_finite(on_gpu):
    """They reach all points of their channel, but for pairs that are left out."""
    features = 100 * (torch.arange(256) >= 128).float().view(1, 1, 256)
    values = random(1, 2, 256)
    values[0, 0, 3] = torch.nan
    found = on_gpu(exact_gaussian_filter, values, features, **FAST)
    assert found[0, 0, :128].isnan().all()
    assert found[0, 0, 128:].isfinite().all() and found[0, 1].isfinite().all()
    found = on_gpu(exact_gaussian_filter, values, features, **FAST, skip_tolerance=0)
    assert found[0, 0].isnan().all() and found[0, 1].isfinite().all()


def test_too_many_points_to_order(on_gpu):
    """Known before anything of their size is allocated."""
    features = torch.zeros(1, 1, 1).expand(2**24, 1, 1)
    with pytest.raises((ValueError, RuntimeError), match=r"fewer than 2\^31 points"):
        on_gpu(torch.ops.pydense.exact_gaussian_order, features)


@pytest.mark.usefixtures("kernel")
def test_fast_mode_on_a_picture(on_gpu, pictures):
    """A part of a photo at the usual parameters, and at sharp ones."""
    from PIL import Image

    with Image.open(pictures / "crf" / "pydensecrf" / "im1.png") as photo:
        data = photo.convert("RGB").resize((40, 30))
        image = torch.from_numpy(np.array(data))[None].movedim(3, 1)
    rows, columns = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    values = random(1, 5, 30, 40).softmax(1)
    for sxy, srgb in ((80, 13), (67, 3)):
        features = torch.cat([torch.stack([columns, rows])[None] * 8 / sxy, image / srgb], 1)
        for normalization in ("symmetric", None):
            options = {"normalization": normalization}
            expected = exact_gaussian_filter(values.double(), features.double(), **options)
            found = on_gpu(exact_gaussian_filter, values, features, **options, **FAST)
            assert relative(found, expected) <= 1e-3


@pytest.mark.usefixtures("kernel")
def test_fast_mode_leaves_out_what_is_below_the_tolerance(on_gpu):
    """Two heaps: at their distance the kernel is 1e-3; each is a run of its own."""
    apart = (2 * torch.log(torch.tensor(1e3))).sqrt()
    features = torch.zeros(1, 2, 256)
    features[0, 0, ::2] = apart
    values = torch.ones(1, 1, 256)
    near = on_gpu(exact_gaussian_filter, values, features, **FAST, skip_tolerance=2e-3)
    assert difference(near, torch.full_like(near, 128)) < 1e-2
    far = on_gpu(exact_gaussian_filter, values, features, **FAST, skip_tolerance=5e-4)
    assert difference(far, torch.full_like(far, 128 + 0.128)) < 1e-2
    assert float((far - near).min()) > 0.1


@settings(max_examples=15)
@given(
    batch=st.integers(0, 3),
    shared=st.booleans(),
    channels=st.integers(1, 60),
    dims=st.integers(1, 12),
    spatial=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    normalization=st.sampled_from(NORMALIZATIONS),
    self_term=st.booleans(),
    twin=st.sampled_from("01"),
)
def test_any_shape_in_fast_mode(on_gpu, batch, shared, channels, dims, spatial, twin, **options):
    features = random(1 if shared else batch, dims, *spatial, seed=3)
    values = random(batch, channels, *spatial, seed=4).abs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYDENSE_EXPERIMENTAL_KERNELS", twin)
        found = on_gpu(exact_gaussian_filter, values, features, **options, **FAST)
        assert found.shape == values.shape and found.is_contiguous()
        if found.numel():
            expected = exact_gaussian_filter(values.double(), features.double(), **options)
            assert difference(found, expected) <= 3e-3 * (1e-3 + float(expected.abs().max()))
        for b in range(batch):
            own = features if shared else features[b : b + 1]
            alone = on_gpu(
                exact_gaussian_filter, values[b : b + 1], own, schedule=b, **options, **FAST
            )
            assert same_bits(found[b : b + 1], alone)


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize(("channels", "dims"), [(1, 2), (8, 5), (21, 5), (30, 3), (60, 8)])
def test_twin_sums_what_the_kernel_for_all_cards_sums(
    on_gpu, monkeypatch, channels, dims, self_term
):
    """And the same bits in whichever order threads run."""
    features, values = random(1, dims, 700, seed=3) * 3, random(1, channels, 700, seed=4)
    options = {"self_term": self_term, **FAST}
    expected = on_gpu(exact_gaussian_filter, values, features, **options)
    monkeypatch.setenv("PYDENSE_EXPERIMENTAL_KERNELS", "1")
    found = [on_gpu(exact_gaussian_filter, values, features, schedule=k, **options) for k in (0, 3)]
    assert relative(found[0], expected) <= 1e-3 and same_bits(*found)


def test_fast_mode_takes_any_layout(on_gpu):
    values, features = random(2, 5, 7, 9), random(2, 3, 7, 9, seed=1)
    op = torch.ops.pydense

    def both(x, f):
        return op.exact_gaussian_filter_fast(x, f, op.exact_gaussian_order(f), True, 1e-4)

    flat = values.flatten(2), features.flatten(2)
    expected = on_gpu(both, *flat)
    for (name, x), (_, f) in zip(layouts(flat[0]), layouts(flat[1]), strict=True):
        assert same_bits(on_gpu(both, x, f), expected), name
    with pytest.raises((ValueError, RuntimeError), match="order must be what"):
        on_gpu(lambda x, f: op.exact_gaussian_filter_fast(x, f, f.int(), True, 0.0), *flat)


@pytest.mark.parametrize(
    ("images", "dims", "points"), [(1, 1, 1), (2, 5, 128), (3, 6, 300), (0, 2, 9)]
)
def test_size_of_an_order_is_known_before(on_gpu, images, dims, points):
    """What a traced program is told of it, on any device but the CPU."""
    features = random(images, dims, points)
    order = on_gpu(torch.ops.pydense.exact_gaussian_order, features)
    told = torch.ops.pydense.exact_gaussian_order(features.to("meta"))
    assert order.shape == told.shape and order.dtype == told.dtype


def test_fast_mode_is_accurate_where_it_has_no_kernel(on_gpu):
    for dims, dtype in ((11, torch.float32), (3, torch.float64)):
        values, features = random(1, 2, 40, dtype=dtype), random(1, dims, 40, seed=1, dtype=dtype)
        expected = on_gpu(exact_gaussian_filter, values, features)
        assert same_bits(on_gpu(exact_gaussian_filter, values, features, **FAST), expected)


def test_fast_mode_on_the_cpu_is_accurate():
    values, features = random(2, 3, 50), random(1, 4, 50, seed=1)
    out = exact_gaussian_filter(values, features, normalization="symmetric")
    options = {"normalization": "symmetric", "precision": "fast", "skip_tolerance": 0.1}
    assert same_bits(exact_gaussian_filter(values, features, **options), out)
    order = torch.ops.pydense.exact_gaussian_order(features)
    assert order.shape == (0, 0, 0)
    opcheck(torch.ops.pydense.exact_gaussian_order.default, (features,))
    for v, f in ((values, features), (values.requires_grad_(), features.requires_grad_())):
        arguments = (v, f, order, False, 0.0)
        opcheck(torch.ops.pydense.exact_gaussian_filter_fast.default, arguments)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"precision": "half"}, ValueError, "precision must be one of 'accurate', 'fast'"),
        ({"skip_tolerance": 1e-3}, ValueError, "must be 0 with precision='accurate', got 0.001"),
        ({**FAST, "skip_tolerance": 1}, ValueError, r"must be in \[0, 1\), got 1"),
        ({**FAST, "skip_tolerance": float("nan")}, ValueError, r"must be in \[0, 1\), got nan"),
        ({**FAST, "skip_tolerance": "0"}, TypeError, "skip_tolerance must be a number, got str"),
    ],
)
def test_bad_options_of_the_fast_mode(options, kind, text):
    with pytest.raises(kind, match=text):
        exact_gaussian_filter(random(1, 2, 5), random(1, 2, 5), **options)
    for call in (
        lambda: dense_crf(random(1, 2, 5), **FAST),
        lambda: DenseCRF(**FAST),
        lambda: CRFasRNN(2, **FAST),
    ):
        with pytest.raises(ValueError, match="precision must be 'accurate' with backend='lattice'"):
            call()


@pytest.mark.parametrize(
    "layer", [DenseCRF(backend="exact", **FAST), CRFasRNN(3, backend="exact", **FAST)]
)
def test_layers_of_the_fast_mode(on_gpu, layer):
    """They ask for it, and their plain-torch twins, which have no such thing, do not."""
    inputs = random(1, 3, 9, 16), picture(1, 3, 9, 16)
    assert "precision='fast'" in repr(layer)
    with torch.no_grad():
        accurate = layer(*inputs)
        fast = on_gpu(lambda *x: copy.deepcopy(layer).to(x[0].device)(*x), *inputs)
        twin = use_operators(copy.deepcopy(layer), "reference")(*inputs)
    scale = max(1, float(accurate.abs().max()))  # probabilities, or logits
    assert 0 < difference(fast, accurate) <= 1e-2 * scale
    torch.testing.assert_close(twin, accurate, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_gradients_of_the_fast_mode(on_gpu):
    """Near those of float64; by the features they are not made fast."""

    def derive(values, features, weights, **options):
        leaves = [x.detach().requires_grad_() for x in (values, features)]
        out = exact_gaussian_filter(*leaves, normalization="symmetric", **options)
        return list(torch.autograd.grad((out * weights).sum(), leaves))

    inputs = [random(2, 4, 150).abs(), random(1, 3, 150, seed=1), random(2, 4, 150, seed=2).abs()]
    found = on_gpu(derive, *inputs, **FAST)
    for one, expected in zip(found, derive(*(x.double() for x in inputs)), strict=True):
        assert relative(one, expected) <= 2e-3


@pytest.mark.usefixtures("kernel")
def test_mean_field_in_fast_mode(on_gpu):
    logits, image = random(2, 21, 9, 16), picture(2, 3, 9, 16)
    layer = DenseCRF(backend="exact", precision="fast", iterations=5)
    assert "precision='fast'" in repr(layer)
    expected = dense_crf(logits, image, iterations=5, backend="exact", **kernels("potts", 21))
    options = {"iterations": 5, "backend": "exact", **kernels("potts", 21), **FAST}
    found = on_gpu(dense_crf, logits, image, **options)
    assert difference(found, expected) <= 1e-2
    runs = [on_gpu(layer, logits, image, schedule=schedule) for schedule in range(3)]
    assert all(same_bits(run, runs[0]) for run in runs)
