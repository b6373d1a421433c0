# SPDX-License-Identifier: Apache-2.0
"""The regularised loss: -sum S^T K S against dense matrices, its gradient, and torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from _ops import compats, layouts, picture, random, same_bits, threads
from _ops import one_thread as one_thread
from torch.autograd import gradcheck

from pydense.losses import dense_crf_loss
from pydense.ops import permutohedral_filter

BILATERAL = {"sxy": 6, "srgb": 20, "compat": 2}


def by_matrix(p, image, sxy, srgb, compat):
    """With the table of all pairs of points."""
    batch, _, height, width = p.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([x, y]).to(p).flatten(1) / sxy
    total = 0
    for i in range(batch):
        f = torch.cat([grid, image[i].to(p).flatten(1) / srgb])
        kernel = (-torch.cdist(f.T, f.T).square() / 2).exp()
        s = p[i].flatten(1)
        total = total - (s * (compat @ s @ kernel.T)).sum()
    return total


def test_exact_is_the_formula():
    p = random(2, 3, 5, 6, dtype=torch.float64).softmax(1).requires_grad_()
    image, matrix = picture(2, 3, 5, 6), compats("matrix", 3).double()
    bilateral = {"sxy": 4, "srgb": 30, "compat": matrix}
    own = dense_crf_loss(
        p, image, bilateral=bilateral, backend="exact", scores_type="probabilities",
        reduction="sum",
    )  # fmt: skip
    truth = by_matrix(p, image, 4, 30, matrix)
    torch.testing.assert_close(own, truth)
    (mine,), (theirs,) = (torch.autograd.grad(loss, p) for loss in (own, truth))
    torch.testing.assert_close(mine, theirs)


def test_gradient_on_the_lattice():
    """-(K + K^T) S, not -2 K S: the lattice is not symmetric."""
    p = random(1, 3, 12, 15, dtype=torch.float64).softmax(1).requires_grad_()
    features = random(1, 4, 12, 15, seed=1, dtype=torch.float64)
    kernel = [{"features": features, "compat": 1}]
    loss = dense_crf_loss(p, features=kernel, scores_type="probabilities", reduction="sum")
    (grad,) = torch.autograd.grad(loss, p)
    forward = permutohedral_filter(p, features)
    expected = -(forward + permutohedral_filter(p, features, reverse=True))
    torch.testing.assert_close(grad, expected)
    assert not torch.allclose(grad, -2 * forward, rtol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    mask = random(2, 5, 6) > -1
    matrix = compats("matrix", 3).double().requires_grad_()

    def run(logits, image, sxy, matrix):
        return dense_crf_loss(
            logits,
            image,
            gaussian={"sxy": sxy, "compat": 0.5},
            bilateral={"sxy": 4.1, "srgb": 31.3, "compat": matrix},
            mask=mask,
            normalization="symmetric",
            reduction=reduction,
            feature_gradient="lattice",
        )

    image = picture(2, 3, 5, 6).double() + random(2, 3, 5, 6, seed=2, dtype=torch.float64)
    sxy = torch.tensor([1.53, 2.17], dtype=torch.float64)
    inputs = [random(2, 3, 5, 6, dtype=torch.float64), image, sxy]
    inputs = [x.requires_grad_() for x in inputs]
    assert gradcheck(run, (*inputs, matrix), eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(
        lambda x: run(x, image.detach(), 1.5, matrix.detach()), inputs[:1]
    )


def test_reductions_and_mask():
    logits, image = random(2, 3, 8, 9), picture(2, 3, 8, 9)
    each = dense_crf_loss(logits, image, bilateral=BILATERAL, reduction="none")
    total = dense_crf_loss(logits, image, bilateral=BILATERAL, reduction="sum")
    mean = dense_crf_loss(logits, image, bilateral=BILATERAL)
    assert each.shape == (2,) and (each < 0).all()
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(total / (2 * 8 * 9), mean)
    mask = torch.ones(2, 8, 9)
    assert torch.equal(dense_crf_loss(logits, image, bilateral=BILATERAL, mask=mask), mean)
    mask[:, :, 4:] = 0
    x = logits.clone().requires_grad_()
    dense_crf_loss(x, image, bilateral=BILATERAL, mask=mask.byte()).backward()
    assert (x.grad[..., 4:] == 0).all() and (x.grad[..., :4] != 0).any()


def test_layouts_dtypes_and_threads():
    logits, image = random(2, 5, 40, 50), picture(2, 3, 40, 50)
    expected = dense_crf_loss(logits, image, bilateral=BILATERAL)
    for name, x in layouts(logits):
        torch.testing.assert_close(
            dense_crf_loss(x, image, bilateral=BILATERAL), expected, msg=name
        )
    half = dense_crf_loss(logits.bfloat16(), image, bilateral=BILATERAL)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(dense_crf_loss(logits, image, bilateral=BILATERAL), expected)
    with threads(3):
        torch.testing.assert_close(dense_crf_loss(logits, image, bilateral=BILATERAL), expected)
    points = random(2, 3, 20), [{"features": random(1, 4, 20), "compat": 1}]
    assert dense_crf_loss(points[0], features=points[1]).isfinite()
    assert dense_crf_loss(logits[:0], image[:0], bilateral=BILATERAL) == 0


def test_compile():
    logits, image = random(1, 3, 8, 9).requires_grad_(), picture(1, 3, 8, 9)

    def loss(x):
        return dense_crf_loss(x, image, bilateral=BILATERAL)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (own,), (eager,) = (torch.autograd.grad(f(logits), logits) for f in (compiled, loss))
    torch.testing.assert_close(own, eager)


def test_errors():
    x, image = random(1, 3, 5, 6), picture(1, 3, 5, 6)
    for options, text in (
        ({}, "gaussian, bilateral or features must be given, got none"),
        ({"reduction": "all"}, "reduction must be one of"),
        ({"scores_type": "energy"}, "scores_type must be one of"),
        ({"bilateral": BILATERAL, "mask": torch.ones(1, 6, 5)}, "mask must have shape"),
        ({"bilateral": {"sxy": 1, "compat": 1}}, "bilateral must be a dict with"),
        ({"self_term": False, "feature_gradient": "lattice"}, "feature_gradient must be 'filter'"),
    ):
        with pytest.raises(ValueError, match=f"dense_crf_loss: {text}"):
            dense_crf_loss(x, image, **options)


def test_is_a_lazy_submodule():
    code = "import pydense, sys; assert 'torch' not in sys.modules; pydense.losses.dense_crf_loss"
    subprocess.run([sys.executable, "-c", code], check=True)
