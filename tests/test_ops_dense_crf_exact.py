# SPDX-License-Identifier: Apache-2.0
"""dense_crf(backend="exact"): the oracle, against float64 goldens and plain torch."""

from __future__ import annotations

import pytest
import torch
from _ops import (
    CHANNELS_LAST,
    NORMALIZATIONS,
    compats,
    layouts,
    picture,
    random,
    same_bits,
    threads,
)
from _ops import one_thread as one_thread

from pydense import reference
from pydense.ops import dense_crf, dense_crf_free_energy, dense_crf_steps

KERNELS = {"gaussian": {"sxy": 3, "compat": 3}, "bilateral": {"sxy": 80, "srgb": 13, "compat": 10}}
NAMES = {"symmetric": "SYM", "before": "BEFORE", "after": "AFTER"}


def difference(a, b):
    return float((a.double() - b.double()).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalization", NAMES)
def test_golden(golden, normalization, dtype):
    """43 x 53 pixels with the full kernel matrix in float64."""
    logits = -torch.from_numpy(golden["unary"]).view(1, 4, 43, 53).to(dtype)
    image = torch.from_numpy(golden["image"]).movedim(2, 0).unsqueeze(0)
    steps = dense_crf_steps(
        logits, image, iterations=5, normalization=normalization, backend="exact", **KERNELS
    )
    marginals = dict(enumerate(steps, 1))
    for iterations in (1, 5):
        expected = golden[f"exact_{NAMES[normalization]}_potts_it{iterations}"]
        q = marginals[iterations].view(4, -1)
        assert difference(q, torch.from_numpy(expected)) <= 1e-5


@pytest.mark.parametrize("self_term", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", ["potts", "diagonal", "matrix"])
def test_against_the_reference(kind, normalization, self_term):
    scale = 0.01 if normalization is None else 1.0
    options = {
        "gaussian": {"sxy": (2, 3), "compat": compats(kind, 4, scale)},
        "bilateral": {"sxy": 8, "srgb": 40, "compat": compats(kind, 4, scale, seed=8)},
        "features": [{"features": random(1, 3, 11, 13, seed=4) / 3, "compat": scale}],
        "iterations": 4,
        "normalization": normalization,
        "self_term": self_term,
        "backend": "exact",
    }
    logits, image = random(2, 4, 11, 13, dtype=torch.float64), picture(2, 3, 11, 13)
    for output in ("probabilities", "logits", "labels"):
        expected = reference.dense_crf(logits, image, output=output, **options)
        assert difference(dense_crf(logits, image, output=output, **options), expected) < 1e-10
    options["output"] = "logits"
    expected = reference.dense_crf(logits, image, **options)
    narrow = difference(dense_crf(logits.float(), image, **options), expected)
    plain = difference(reference.dense_crf(logits.float(), image, **options), expected)
    assert narrow <= 2 * plain + 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 60), (2, 3, 3, 4, 5)])
def test_points_and_volumes(shape):
    logits, features = random(*shape, dtype=torch.float64), random(2, 4, *shape[2:], seed=1)
    options = {"features": [{"features": features, "compat": 2}], "backend": "exact"}
    image = None
    if len(shape) == 5:
        image = picture(1, 1, *shape[2:])
        options |= {"gaussian": {"sxy": (1, 2, 3), "compat": 1}}
        options |= {"bilateral": {"sxy": 4, "srgb": 20, "compat": 1}}
    out = dense_crf(logits, image, **options)
    assert difference(out, reference.dense_crf(logits, image, **options)) < 1e-10


def test_like_the_lattice_where_both_are_exact():
    """All points in one place: nothing to approximate."""
    logits = random(1, 3, 30)
    kernel = {"features": torch.zeros(1, 2, 30), "compat": 2.0}
    options = {"features": [kernel], "normalization": "symmetric"}
    exact = dense_crf(logits, backend="exact", **options)
    assert difference(exact, dense_crf(logits, **options)) < 1e-5
    parts = dense_crf_free_energy(exact, logits, backend="exact", **options)
    there = dense_crf_free_energy(exact, logits, **options)
    for a, b in zip(parts, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_layouts_batches_threads(dtype):
    options = {**KERNELS, "backend": "exact", "self_term": False}
    logits, image = random(2, 5, 12, 9).to(dtype), picture(2, 3, 12, 9)
    expected = dense_crf(logits, image, iterations=3, **options)
    *_, last = dense_crf_steps(logits, image, iterations=3, **options)
    assert same_bits(last, expected)
    for b in range(2):
        alone = dense_crf(logits[b : b + 1], image[b : b + 1], iterations=3, **options)
        assert same_bits(alone, expected[b : b + 1])
    for count in (1, 2, 4):
        with threads(count):
            assert same_bits(dense_crf(logits, image, iterations=3, **options), expected)
    for name, x in layouts(logits):
        for output in ("probabilities", "logits", "labels"):
            out = dense_crf(x, image, iterations=3, output=output, **options)
            wanted = dense_crf(logits, image, iterations=3, output=output, **options)
            assert same_bits(out, wanted), name
            form = torch.channels_last if name in CHANNELS_LAST else torch.contiguous_format
            assert output == "labels" or out.is_contiguous(memory_format=form), name
    assert dense_crf(logits[:0], image[:0], **options).shape == (0, 5, 12, 9)


def test_what_is_no_distribution_is_an_error():
    logits, features = random(1, 3, 20), random(1, 2, 20)
    for bad in (torch.nan, torch.inf):
        wrong = logits.clone()
        wrong[0, 1, 2] = bad
        kernel = {"features": features, "compat": 1}
        for iterations in (0, 2):
            with pytest.raises(ValueError, match="unary"):
                dense_crf(wrong, features=[kernel], backend="exact", iterations=iterations)
        wrong = features.clone()
        wrong[0, 1, 2] = bad
        with pytest.raises(ValueError, match="features must be finite"):
            dense_crf(logits, features=[{"features": wrong, "compat": 1}], backend="exact")


def test_compile_and_export():
    class Exact(torch.nn.Module):
        def forward(self, logits, image):
            return dense_crf(logits, image, iterations=2, backend="exact", **KERNELS)

    torch._dynamo.reset()
    compiled = torch.compile(Exact(), fullgraph=True, backend="aot_eager")
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    inputs = (random(2, 3, 6, 7), picture(2, 3, 6, 7))
    exported = torch.export.export(Exact(), inputs, dynamic_shapes=(sizes, sizes)).module()
    for size in ((2, 6, 7), (3, 8, 5)):
        logits, image = random(size[0], 3, *size[1:]), picture(size[0], 3, *size[1:])
        expected = Exact()(logits, image)
        assert same_bits(compiled(logits, image), expected)
        assert same_bits(exported(logits, image), expected)
