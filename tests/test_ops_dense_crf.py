# SPDX-License-Identifier: Apache-2.0
"""pydense.ops.dense_crf: its numbers, against pydense.densecrf, plain torch and sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _ops import NORMALIZATIONS, compats, picture, random, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

import pydense.densecrf as dcrf
from pydense import reference
from pydense.ops import dense_crf, dense_crf_steps

KINDS = ("potts", "diagonal", "matrix")
NUMPY_NORMALIZATIONS = {
    "symmetric": dcrf.NORMALIZE_SYMMETRIC,
    "before": dcrf.NORMALIZE_BEFORE,
    "after": dcrf.NORMALIZE_AFTER,
    None: dcrf.NO_NORMALIZATION,
}
KERNELS = {"gaussian": {"sxy": 3, "compat": 3}, "bilateral": {"sxy": 40, "srgb": 13, "compat": 10}}


def difference(a, b):
    return float((a.double() - b.double()).abs().max())


def numpy_compat(compat):
    """The same compatibility in the signs of pydense.densecrf."""
    return compat if isinstance(compat, float) else -compat.numpy()


class TestBitsOfTheNumpyModule:
    """float32 results are those of pydense.densecrf, bit for bit."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_images(self, normalization, kind):
        labels, height, width = 5, 23, 31
        scale = 0.01 if normalization is None else 1.0
        compat = compats(kind, labels, scale)
        if kind == "matrix":
            compat = (compat + compat.T) / 2  # pydensecrf knows no other
        logits = random(2, labels, height, width, seed=1)
        image = picture(2, 3, height, width)
        gaussian = {"sxy": (3, 2.5), "compat": compat}
        bilateral = {"sxy": (20, 30), "srgb": (13, 7, 9.1), "compat": compat}
        options = {"gaussian": gaussian, "bilateral": bilateral, "normalization": normalization}
        for iterations in (0, 1, 4):
            q = dense_crf(logits, image, iterations=iterations, **options)
            labelled = dense_crf(logits, image, iterations=iterations, output="labels", **options)
            for b in range(2):
                model = dcrf.DenseCRF2D(width, height, labels)
                model.setUnaryEnergy(-logits[b].view(labels, -1).numpy())
                norm = NUMPY_NORMALIZATIONS[normalization]
                there = numpy_compat(compat)
                model.addPairwiseGaussian((3, 2.5), there, normalization=norm)
                rgb = image[b].movedim(0, 2).numpy()
                model.addPairwiseBilateral((20, 30), (13, 7, 9.1), rgb, there, normalization=norm)
                expected = model.inference(iterations)
                assert np.array_equal(q[b].view(labels, -1).numpy(), expected)
                assert np.array_equal(labelled[b].flatten().numpy(), expected.argmax(0))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_image_dtypes(self, dtype, channels):
        image = picture(1, channels, 14, 15).to(dtype)
        if dtype.is_floating_point:
            image = image + 0.123456789
        logits = random(1, 2, 14, 15)
        q = dense_crf(logits, image, bilateral={"sxy": 9, "srgb": 7.3, "compat": 3})
        model = dcrf.DenseCRF2D(15, 14, 2)
        model.setUnaryEnergy(-logits.view(2, -1).numpy())
        model.addPairwiseBilateral(9, 7.3, image[0].movedim(0, 2).numpy(), 3)
        assert np.array_equal(q.view(2, -1).numpy(), model.inference(10))

    def test_a_photo(self, pictures):
        image_module = pytest.importorskip("PIL.Image")
        rgb = np.array(
            image_module.open(pictures / "crf" / "pydensecrf" / "im1.png").convert("RGB")
        )
        height, width, _ = rgb.shape
        logits = random(1, 21, height, width)
        model = dcrf.DenseCRF2D(width, height, 21)
        model.setUnaryEnergy(-logits.view(21, -1).numpy())
        model.addPairwiseGaussian(1, 3)
        model.addPairwiseBilateral(67, 3, rgb, 4)
        q = dense_crf(
            logits,
            torch.from_numpy(rgb).movedim(2, 0).unsqueeze(0),  # a view, channels last
            gaussian={"sxy": 1, "compat": 3},
            bilateral={"sxy": 67, "srgb": 3, "compat": 4},
        )
        assert np.array_equal(q.view(21, -1).numpy(), model.inference(10))

    def test_volumes(self):
        depth, height, width = 4, 9, 11
        logits, image = random(1, 3, depth, height, width), picture(1, 2, depth, height, width)
        q = dense_crf(
            logits,
            image,
            gaussian={"sxy": (2, 3, 1.5), "compat": 2},
            bilateral={"sxy": 5, "srgb": 20, "compat": 4},
            normalization="after",
        )
        z, y, x = np.indices((depth, height, width), dtype=np.float32).reshape(3, -1)
        model = dcrf.DenseCRF(x.size, 3)
        model.setUnaryEnergy(-logits.view(3, -1).numpy())
        grid = np.stack([x, y, z])
        position = grid / np.array([2, 3, 1.5], np.float32)[:, None]
        model.addPairwiseEnergy(position, 2, normalization=dcrf.NORMALIZE_AFTER)
        colours = image.view(2, -1).numpy().astype(np.float32) / np.float32(20)
        features = np.concatenate([grid / np.float32(5), colours])
        model.addPairwiseEnergy(features, 4, normalization=dcrf.NORMALIZE_AFTER)
        assert np.array_equal(q.view(3, -1).numpy(), model.inference(10))

    def test_points(self):
        logits, features = random(2, 4, 150), random(2, 6, 150, seed=3)
        model = {"features": [{"features": features, "compat": 2.0}], "iterations": 3}
        q = dense_crf(logits, **model)
        for b in range(2):
            there = dcrf.DenseCRF(150, 4)
            there.setUnaryEnergy(-logits[b].numpy())
            there.addPairwiseEnergy(features[b].numpy(), 2)
            assert np.array_equal(q[b].numpy(), there.inference(3))


def both(unary, image=None, **options):
    return dense_crf(unary, image, **options), reference.dense_crf(unary, image, **options)


@pytest.mark.parametrize("self_term", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind, normalization, self_term):
    labels = 4
    scale = 0.01 if normalization is None else 1.0
    logits = random(2, labels, 11, 13, dtype=torch.float64)
    image = picture(2, 3, 11, 13)
    options = {
        "gaussian": {"sxy": 2, "compat": compats(kind, labels, scale)},
        "bilateral": {"sxy": 8, "srgb": 40, "compat": compats(kind, labels, scale, seed=8)},
        "features": [{"features": random(1, 3, 11, 13, seed=4) / 3, "compat": [scale] * labels}],
        "iterations": 5,
        "normalization": normalization,
        "self_term": self_term,
    }
    for output in ("probabilities", "logits"):
        out, expected = both(logits, image, output=output, **options)
        assert difference(out, expected) < 1e-10
    narrow, plain = both(logits.float(), image, output="logits", **options)
    assert difference(narrow, expected) <= 2 * difference(plain, expected) + 1e-6


@settings(max_examples=40)
@given(
    batch=st.integers(0, 3),
    labels=st.integers(1, 40),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    shared=st.booleans(),
    channels=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    normalization=st.sampled_from(NORMALIZATIONS),
    iterations=st.integers(0, 4),
    output=st.sampled_from(["probabilities", "logits", "labels"]),
)
def test_any_shape(
    batch, labels, spatial, shared, channels, kind, normalization, iterations, output
):
    image = picture(1 if shared else batch, channels, *spatial)
    compat = compats(kind, labels, 0.1)
    options = {"iterations": iterations, "normalization": normalization, "output": output}
    options["features"] = [{"features": image / 20, "compat": compat}]
    if len(spatial) > 1:
        options["gaussian"] = {"sxy": 2, "compat": compat}
        options["bilateral"] = {"sxy": 5, "srgb": 13, "compat": compat}
    on_grid = image if len(spatial) > 1 else None
    logits = random(batch, labels, *spatial, seed=5, dtype=torch.float64)
    out, expected = both(logits, on_grid, **options)
    assert out.shape == expected.shape and out.dtype == expected.dtype and out.is_contiguous()
    if output == "labels":
        assert torch.equal(out, expected)
    elif batch:
        assert difference(out, expected) < 1e-10
    together = dense_crf(logits.float(), on_grid, **options)
    for b in range(batch):
        own = image if shared else image[b : b + 1]
        options["features"] = [{"features": own / 20, "compat": compat}]
        alone = dense_crf(logits[b : b + 1].float(), None if on_grid is None else own, **options)
        assert same_bits(together[b : b + 1], alone)


def test_the_three_forms_attract():
    """w, [w] * L and w I are one model, and positive smooths while negative does the opposite."""
    logits, image = random(1, 3, 20, 20), picture(1, 3, 20, 20)

    def run(compat):
        return dense_crf(logits, image, gaussian={"sxy": 3, "compat": compat})

    expected = run(2.0)
    assert difference(run([2.0] * 3), expected) < 1e-6
    assert difference(run(torch.eye(3) * 2), expected) < 1e-6
    assert difference(run(torch.eye(3) * 2 - 2), expected) < 1e-5  # -w (1 - I)
    logits = torch.tensor([0.5, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 20, 20)
    leading = [float(run(compat)[0, 0, 9, 9]) for compat in (-2.0, 0, 2.0)]
    assert leading[0] + 0.02 < leading[1] < leading[2] - 0.2


def test_matrix_rows_act_on_their_label():
    """new[l] += sum_m C[l, m] (K q)[m], by hand for all points in one place."""
    logits, matrix = random(1, 3, 8), random(3, 3, seed=1)
    kernel = {"features": torch.zeros(1, 1, 8), "compat": matrix}
    out = dense_crf(logits, features=[kernel], iterations=1, normalization="after", output="logits")
    mean = logits.softmax(1).mean(2, keepdim=True)
    assert difference(out, logits + matrix @ mean) < 1e-5


class TestUnaryTypesAndOutputs:
    logits = random(2, 3, 7, 9, seed=6)
    image = picture(2, 3, 7, 9)

    def run(self, unary, **options):
        return dense_crf(unary, self.image, **KERNELS, **options)

    def test_energy(self):
        assert same_bits(self.run(-self.logits, unary_type="energy"), self.run(self.logits))

    def test_probabilities(self):
        p = self.logits.softmax(1)
        assert difference(self.run(p, unary_type="probabilities"), self.run(self.logits)) < 1e-5
        assert same_bits(self.run(p, unary_type="probabilities"), self.run(p.log()))

    def test_outputs_agree(self):
        for iterations in (0, 1, 5):
            z = self.run(self.logits, iterations=iterations, output="logits")
            q = self.run(self.logits, iterations=iterations)
            labels = self.run(self.logits, iterations=iterations, output="labels")
            assert difference(z.softmax(1), q) < 1e-5
            assert labels.dtype == torch.int64 and torch.equal(labels, z.argmax(1))
            assert difference(q.sum(1), torch.ones(2, 7, 9)) < 1e-5
        assert same_bits(self.run(self.logits, iterations=0, output="logits"), self.logits)

    def test_ties_go_to_the_lowest_label(self):
        for labels in (2, 5, 21, 40):
            equal = torch.zeros(1, labels, 4, 4)
            assert dense_crf(equal, output="labels").eq(0).all()
            equal[:, 0] = -1
            assert dense_crf(equal, output="labels").eq(1 if labels > 1 else 0).all()

    def test_no_kernels(self):
        assert difference(dense_crf(self.logits), self.logits.softmax(1)) < 1e-6
        assert difference(dense_crf(self.logits.double()), self.logits.double().softmax(1)) < 1e-15

    def test_forbidden_labels(self):
        logits = self.logits.clone()
        logits[0, 1, 2, 3] = -torch.inf
        logits[1, :2] = -torch.inf
        q = self.run(logits)
        assert q.isfinite().all() and q[0, 1, 2, 3] == 0
        assert q[1, :2].eq(0).all() and q[1, 2].eq(1).all()
        assert difference(self.run(-logits, unary_type="energy"), q) == 0
        p = logits.softmax(1)
        assert self.run(p, unary_type="probabilities")[0, 1, 2, 3] == 0
        z = self.run(logits, output="logits")
        assert z[0, 1, 2, 3] == -torch.inf and not z.isnan().any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all forbidden"])
    @pytest.mark.parametrize("iterations", [0, 1, 4])
    def test_what_is_no_distribution_is_an_error(self, bad, iterations, dtype):
        logits = self.logits.to(dtype)
        logits[1, slice(None) if bad == "all forbidden" else 1, 6, 8] = (
            -torch.inf if bad == "all forbidden" else bad
        )
        for output in ("probabilities", "logits", "labels"):
            with pytest.raises(ValueError, match="unary"):
                self.run(logits, iterations=iterations, output=output)
            with pytest.raises(ValueError, match="unary"):
                options = {"unary_type": "energy", "output": output}
                self.run(-logits, iterations=iterations, **options)
        p = self.logits.softmax(1)
        p[0, 1, 2, 2] = -0.1
        with pytest.raises(ValueError, match="unary"):
            self.run(p, unary_type="probabilities", iterations=iterations)

    def test_compat_that_overflows(self):
        with pytest.raises(ValueError, match="compat"):
            dense_crf(self.logits, gaussian={"sxy": 3, "compat": 3e38}, normalization=None)
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match="compat"):
                dense_crf(self.logits, gaussian={"sxy": 3, "compat": torch.tensor(bad)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_steps_are_the_iterations(dtype):
    logits, image = random(2, 5, 12, 9).to(dtype), picture(1, 3, 12, 9)
    options = {**KERNELS, "self_term": False, "normalization": "after"}
    count = 0
    for count, q in enumerate(dense_crf_steps(logits, image, iterations=4, **options), 1):
        assert same_bits(q, dense_crf(logits, image, iterations=count, **options))
    assert count == 4
    endless = dense_crf_steps(logits, image, iterations=None, **options)
    last = [next(endless) for _ in range(11)][-1]
    assert same_bits(last, dense_crf(logits, image, iterations=11, **options))
    assert [*dense_crf_steps(logits, image, iterations=0, **options)] == []


def test_steps_check_at_the_call():
    with pytest.raises(ValueError, match=r"^dense_crf_steps: unary must have a shape out of"):
        dense_crf_steps(torch.zeros(2, 2))


def test_16_bit_is_computed_in_float32():
    logits, image = random(1, 4, 10, 11), picture(1, 3, 10, 11)
    for dtype in (torch.float16, torch.bfloat16):
        small = logits.to(dtype)
        for output in ("probabilities", "logits", "labels"):
            wide = dense_crf(small.float(), image, output=output, **KERNELS)
            out = dense_crf(small, image, output=output, **KERNELS)
            assert same_bits(out, wide if output == "labels" else wide.to(dtype))


def test_threads_and_runs():
    """18,000 points: more than one band of the lattice; fused iterations and others."""
    logits, image = random(2, 21, 150, 120), picture(2, 3, 150, 120)
    results = []
    for count in (1, 2, 4, 4):
        with threads(count):
            few = dense_crf(logits, image, iterations=3, **KERNELS)  # few vertices
            many = dense_crf(logits, image, bilateral={"sxy": 9, "srgb": 2, "compat": 4})
            results.append((few, many, dense_crf(logits.double(), image, **KERNELS)))
    for result in results:
        assert all(map(same_bits, result, results[0]))


def test_one_pixel():
    logits, image = random(2, 3, 1, 1), picture(2, 3, 1, 1)
    z = dense_crf(logits, image, output="logits", iterations=1, **KERNELS)
    assert difference(z, logits + 13 * logits.softmax(1)) < 1e-5  # all its mass is its own
    alone = dense_crf(logits.double(), image, self_term=False, **KERNELS)
    assert difference(alone, logits.softmax(1)) < 1e-6
