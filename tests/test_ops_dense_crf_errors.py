# SPDX-License-Identifier: Apache-2.0
"""What the dense CRF functions refuse before any work, and that the texts say what to do."""

from __future__ import annotations

import decimal
import re

import numpy as np
import pytest
import torch

from pydense import _library
from pydense.ops import dense_crf, dense_crf_energy, dense_crf_free_energy, dense_crf_steps

NAN, INF = float("nan"), float("inf")
U, IMAGE = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
GAUSSIAN = {"sxy": 3, "compat": 3}
BILATERAL = {"sxy": 80, "srgb": 13, "compat": 10}

# Every function of the room with the same arguments.
FUNCTIONS = {
    "dense_crf": dense_crf,
    "dense_crf_steps": dense_crf_steps,
    "dense_crf_free_energy": lambda unary, *a, **k: dense_crf_free_energy(U, unary, *a, **k),
    "dense_crf_energy": lambda unary, *a, **k: dense_crf_energy(U[:, 0].long(), unary, *a, **k),
}


def refused(kind, text, *arguments, function="dense_crf", **options):
    with pytest.raises(kind, match=rf"^{function}: .*" + re.escape(text)):
        FUNCTIONS[function](*arguments, **options)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("unary", "kind", "text"),
    [
        (None, TypeError, "unary must be a tensor, got None"),
        (U.numpy(), TypeError, "unary must be a tensor, got ndarray"),
        (U.long(), TypeError, "unary must be of dtype float32, float64, float16 or bfloat16, got"),
        (U.to(torch.complex64), TypeError, "unary must be of dtype"),
        (U[0, 0], ValueError, "unary must have a shape out of (N, C, P), (N, C, H, W), (N, C, D"),
        (U[None, None], ValueError, "unary must have a shape out of"),
        (U[:, :0], ValueError, "with C >= 1, got (2, 0, 4, 5)"),
        (
            torch.zeros(1, 65537, 1, 1),
            ValueError,
            "unary must have at most 65536 labels, got 65537",
        ),
        (U.to("meta"), NotImplementedError, "unary must be on the CPU"),
    ],
)
def test_unary(function, unary, kind, text):
    with pytest.raises(kind, match=rf"^{function}: .*" + re.escape(text)):
        FUNCTIONS[function](unary, IMAGE, gaussian=GAUSSIAN)


@pytest.mark.parametrize(
    ("image", "kind", "text"),
    [
        (None, ValueError, "image must be given for a bilateral kernel, got None"),
        (IMAGE.numpy(), TypeError, "image must be a tensor, got ndarray"),
        (U.to(torch.complex64), TypeError, "image must hold real numbers, got torch.complex64"),
        (IMAGE[0], ValueError, "image must have shape (N or 1, channels, 4, 5) with N = 2 for a"),
        (IMAGE.transpose(2, 3), ValueError, "image must have shape (N or 1, channels, 4, 5)"),
        (IMAGE.movedim(1, 3), ValueError, "image must have shape (N or 1, channels, 4, 5)"),
        (IMAGE[:, :0], ValueError, "of shape (2, 3, 4, 5), got (2, 0, 4, 5)"),
        (IMAGE.repeat(2, 1, 1, 1), ValueError, "got (4, 3, 4, 5)"),
        (IMAGE.repeat(1, 11, 1, 1), ValueError, "image must have at most 30 channels, got 33"),
        (U.to("meta"), NotImplementedError, "image must be on the CPU"),
    ],
)
def test_image(image, kind, text):
    for function in FUNCTIONS:
        refused(kind, text, U, image, bilateral=BILATERAL, function=function)


@pytest.mark.parametrize("name", ["gaussian", "bilateral"])
@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (3, TypeError, "compat, got int"),
        ((3, 3), TypeError, "compat, got tuple"),
        ({}, ValueError, "got the keys []"),
        ({"sxy": 3}, ValueError, "got the keys ['sxy']"),
        ({"sxy": 3, "w": 3}, ValueError, "got the keys ['sxy', 'w']"),
        (
            {**BILATERAL, "kernel": 1},
            ValueError,
            "got the keys ['sxy', 'srgb', 'compat', 'kernel']",
        ),
    ],
)
def test_kernels(name, value, kind, text):
    with pytest.raises(kind, match=rf"^dense_crf: {name} must be a dict with .*" + re.escape(text)):
        dense_crf(U, IMAGE, **{name: value})


def test_features():
    def run(features, unary=U, **options):
        return dense_crf(unary, features=features, **options)

    kernel = {"features": U, "compat": 1}
    for features, kind, text in [
        (kernel, TypeError, "features must be a sequence of dicts, got dict"),
        (U, TypeError, "features must be a sequence of dicts, got a torch.float32 tensor"),
        (
            [U],
            TypeError,
            "features[0] must be a dict with features and compat, got a torch.float32",
        ),
        ([kernel, {"features": U}], ValueError, "features[1] must be a dict with features and"),
        ([{**kernel, "features": None}], TypeError, "features[0]['features'] must be a tensor"),
        ([{**kernel, "features": U[0]}], ValueError, "features[0]['features'] must have shape"),
        ([{**kernel, "features": U[..., 1:]}], ValueError, "features[0]['features'] must have sha"),
        ([{**kernel, "compat": [1, 2]}], ValueError, "features[0]['compat'] must be a number or"),
        (
            [{**kernel, "features": torch.zeros(1, 33, 4, 5)}],
            ValueError,
            "features[0]['features'] must have at most 32 dimensions, got 33",
        ),
    ]:
        with pytest.raises(kind, match=re.escape(f"dense_crf: {text}")):
            run(features)
    for bad in (NAN, INF, -INF, 1e9):
        wrong = U.clone()
        wrong[1, 2, 3, 4] = bad
        with pytest.raises(ValueError, match="features must be finite and within"):
            run([{**kernel, "features": wrong}])
        if not abs(bad) < INF:
            with pytest.raises(ValueError, match="features must be finite"):
                run([{**kernel, "features": wrong}], backend="exact")


def test_points_have_no_grid():
    points = U.flatten(2)
    refused(ValueError, "gaussian must be None for point sets", points, gaussian=GAUSSIAN)
    refused(ValueError, "bilateral must be None for point sets", points, bilateral=BILATERAL)
    refused(ValueError, "image must be None for point sets", points, IMAGE.flatten(2))


@pytest.mark.parametrize("sigma", [0, -1, NAN, INF, -INF, (3, 0), [3, NAN], np.array([1, -1])])
def test_sigmas(sigma):
    gaussian = {"sxy": sigma, "compat": 3}
    refused(ValueError, "gaussian['sxy'] must be positive and finite", U, gaussian=gaussian)
    bilateral = {"sxy": sigma, "srgb": 1, "compat": 3}
    refused(ValueError, "bilateral['sxy'] must be positive", U, IMAGE, bilateral=bilateral)
    colour = (*sigma, 1) if isinstance(sigma, tuple) else sigma
    bilateral = {"sxy": 3, "srgb": colour, "compat": 3}
    refused(ValueError, "bilateral['srgb'] must be positive", U, IMAGE, bilateral=bilateral)


@pytest.mark.parametrize("sigma", [1e-60, 1e-44, 1e-20, 1e-8])
def test_tiny_sigmas_are_refused_not_aliased(sigma):
    with pytest.raises(ValueError, match="features must be finite and within"):
        dense_crf(U, gaussian={"sxy": sigma, "compat": 3})
    with pytest.raises(ValueError, match="features must be finite and within"):
        bilateral = {"sxy": 80, "srgb": sigma, "compat": 3}
        dense_crf(U, IMAGE + 200, bilateral=bilateral)


@pytest.mark.parametrize("sigma", [(), (3,), (3, 3, 3), [[3, 3]], np.ones((2, 2))])
def test_sigma_counts(sigma):
    gaussian = {"sxy": sigma, "compat": 3}
    with pytest.raises(ValueError, match=r"gaussian\['sxy'\] must be a number or (2 )?numbers"):
        dense_crf(U, gaussian=gaussian)
    with pytest.raises(ValueError, match=r"gaussian\['sxy'\] must be a number or (3 )?numbers"):
        gaussian = {"sxy": sigma if len(sigma) != 3 else (1, 2), "compat": 3}
        dense_crf(U.unsqueeze(2), gaussian=gaussian)
    bilateral = {"sxy": 3, "srgb": (3, 3), "compat": 3}
    refused(
        ValueError, "bilateral['srgb'] must be a number or 3 numbers", U, IMAGE, bilateral=bilateral
    )


@pytest.mark.parametrize(
    "bad", [None, "3", 3j, decimal.Decimal(3), object(), [None], torch.ones(2) * 3j]
)
def test_types_of_numbers(bad):
    for key in ("sxy", "srgb"):
        bilateral = {**BILATERAL, key: bad}
        text = f"bilateral[{key!r}] must hold real numbers, got"
        refused(TypeError, text, U, IMAGE, bilateral=bilateral)
    if not isinstance(bad, torch.Tensor):
        text = "gaussian['compat'] must hold real numbers, got"
        refused(TypeError, text, U, gaussian={"sxy": 3, "compat": bad})


@pytest.mark.parametrize(
    "compat", [NAN, INF, -INF, [1, NAN, 1], [[0, 0, -INF]] * 3, np.full((3, 3), NAN)]
)
def test_compat_values(compat):
    refused(
        ValueError, "gaussian['compat'] must be finite", U, gaussian={"sxy": 3, "compat": compat}
    )
    for backend in ("lattice", "exact"):
        with pytest.raises(ValueError, match="compat"):  # as a tensor: found by the operator
            tensor = torch.tensor(compat)
            dense_crf(U, gaussian={"sxy": 3, "compat": tensor}, backend=backend)


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (4,), (3, 1), (1, 3), (3, 3, 3)])
def test_compat_shapes(shape):
    text = "must be a number or have shape (3,) or (3, 3) for 3 labels, got shape"
    for compat in (torch.ones(shape), np.ones(shape), torch.ones(shape).tolist()):
        gaussian = {"sxy": 3, "compat": compat}
        refused(ValueError, f"gaussian['compat'] {text} {shape}", U, gaussian=gaussian)
    ragged = {"sxy": 3, "compat": [[1, 2, 3], [1, 2], [1]]}
    refused(ValueError, "gaussian['compat'] must have rows of one length", U, gaussian=ragged)
    complex_numbers = {"sxy": 3, "compat": torch.ones(3, dtype=torch.complex64)}
    refused(TypeError, "gaussian['compat'] must hold real numbers", U, gaussian=complex_numbers)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"iterations": -1}, ValueError, "iterations must be in [0, 2147483647], got -1"),
        ({"iterations": 2**31}, ValueError, "iterations must be in [0, 2147483647], got"),
        ({"iterations": 2.0}, TypeError, "iterations must be an integer, got float"),
        ({"iterations": None}, TypeError, "iterations must be an integer, got None"),
        ({"output": "argmax"}, ValueError, "output must be one of 'probabilities', 'logits', 'la"),
        ({"output": None}, ValueError, "output must be one of 'probabilities'"),
        (
            {"normalization": "none"},
            ValueError,
            "must be one of 'symmetric', 'before', 'after', No",
        ),
        ({"normalization": 3}, ValueError, "normalization must be one of"),
        ({"normalization": U}, ValueError, "normalization must be one of"),
        ({"unary_type": "scores"}, ValueError, "unary_type must be one of 'logits', 'probabilitie"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'lattice', 'exact', got 'cuda'"),
        ({"self_term": 1}, TypeError, "self_term must be a bool, got int"),
        ({"self_term": None}, TypeError, "self_term must be a bool, got None"),
    ],
)
def test_options(options, kind, text):
    with pytest.raises(kind, match=r"^dense_crf: .*" + re.escape(text)):
        dense_crf(U, **options)


def test_integers_of_other_types():
    expected = dense_crf(U, gaussian=GAUSSIAN, iterations=2)
    for two in (np.int64(2), torch.tensor(2)):
        assert torch.equal(dense_crf(U, gaussian=GAUSSIAN, iterations=two), expected)
    for three in (np.float32(3), np.array(3), np.array([3, 3]), (3, 3.0), [np.int8(3), 3]):
        gaussian = {"sxy": three, "compat": np.float64(3)}
        assert torch.equal(dense_crf(U, gaussian=gaussian, iterations=2), expected)


class TestOperators:
    """Called past the functions, they check what would crash them."""

    @pytest.fixture(autouse=True)
    def _load(self):
        _library.load()

    def mean_field(self, unary=U, lattices=(), compats=(), iterations=1, q=None, output="logits"):
        return torch.ops.pydense.dense_crf_mean_field(
            unary, [*lattices], [*compats], iterations, False, q, output
        )

    def lattice(self, features=U, normalization="none"):
        return torch.ops.pydense.dense_crf_lattice(features, normalization, True)

    def test_lattice(self):
        for features in (U[0], U.half(), torch.zeros(1, 33, 2, 2), U[:, :0]):
            with pytest.raises(ValueError, match="dense_crf_lattice: features must"):
                self.lattice(features)
        with pytest.raises(ValueError, match="dense_crf_lattice: normalization must"):
            self.lattice(normalization="symmetrical")

    def test_mean_field(self):
        good, one = self.lattice(), torch.tensor(1.0)
        for text, options in {
            "unary must": {"unary": U[0]},
            "dtype": {"unary": U.half()},
            "iterations must": {"iterations": -1},
            "output must": {"output": "best"},
            "compats must": {"lattices": [good]},
            "lattices": {"lattices": [good.float()], "compats": [one]},
            "lattice": {"lattices": [good[:100]], "compats": [one]},
            "must come from": {"lattices": [torch.zeros_like(good)], "compats": [one]},
            "must hold 1 or 2": {
                "lattices": [self.lattice(U.repeat(2, 1, 1, 1))],
                "compats": [one],
            },
            "points": {"lattices": [self.lattice(U[..., 1:])], "compats": [one]},
            "float": {"lattices": [self.lattice(U.double())], "compats": [one]},
            "compats": {"lattices": [good], "compats": [one.double()]},
            "compats must have shape": {"lattices": [good], "compats": [torch.ones(2)]},
            "q must": {"q": U[:1]},
            "q must be": {"q": U.double()},
        }.items():
            with pytest.raises(ValueError, match=text):
                self.mean_field(**options)
        assert self.mean_field(lattices=[good], compats=[one]).shape == U.shape

    def test_filter(self):
        good = self.lattice()
        for values, lattice in [
            (U[0], good),
            (U.half(), good),
            (U.double(), good),
            (U[..., 1:], good),
            (U.repeat(2, 1, 1, 1), good),
            (U, good[64:]),
            (U, good.float()),
        ]:
            with pytest.raises(ValueError, match="permutohedral_filter: "):
                torch.ops.pydense.permutohedral_filter(values, lattice, False)
