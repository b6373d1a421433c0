# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of upsampled logits against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from _heads import SHAPES, assert_in_budget, scores, targets
from _ops import CHANNELS_LAST, layouts, one_number, same_bits
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from pydense import reference
from pydense.ops import upsample_argmax, upsample_cross_entropy
from pydense.reference.segmentation_head import upsample

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rounding of coordinates and of exp, where torch happens to be exact.
FLOOR = {torch.float64: 1e-13}


def gradients(function, logits, target, **options):
    """Loss and gradient, in the dtype of the logits."""
    x = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(x, target, **options)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.rand(loss.shape, generator=generator, dtype=torch.float64) + 0.5
    loss.backward(upstream.to(loss))
    return loss.detach(), x.grad


class TestCrossEntropy:
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_all"])
    def test_loss_and_gradient(self, backend, reduction, dtype, align_corners):
        for index, (shape, size) in enumerate(SHAPES):
            logits = scores(*shape).to(backend.device)
            target = targets(shape[0], size, shape[1]).to(backend.device)
            options = {
                "reduction": reduction,
                "ignore_index": 255,
                "align_corners": align_corners,
            }
            generator = torch.Generator().manual_seed(index)
            if index % 2:
                weight = torch.rand(shape[1], generator=generator).double() + 0.1
                options["weight"] = weight.to(backend.device)
            if index % 3:
                options["label_smoothing"] = 0.125 * (index % 3)
            if index % 4 > 1:
                factor = torch.rand(target.shape, generator=generator).double()
                options["pixel_weight"] = factor.to(backend.device)
            exact = gradients(reference.upsample_cross_entropy, logits, target, **options)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            narrow = {k: v.to(wide) if k.endswith("weight") else v for k, v in options.items()}
            got = gradients(upsample_cross_entropy, logits.to(dtype), target, **narrow)
            assert got[0].dtype == wide and got[1].dtype == dtype
            torchs = gradients(reference.upsample_cross_entropy, logits.to(wide), target, **narrow)
            floor = FLOOR.get(dtype, 1e-6)
            assert_in_budget(got[0], exact[0], lambda t=torchs: t[0], floor, shape)
            gradient_floor = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, floor)
            # Of the pixels that a source pixel reaches; one class has gradient 0.
            unit = target.numel() / (shape[0] * shape[2] * shape[3])
            unit /= target.numel() if reduction.startswith("mean") else 1
            assert_in_budget(got[1], exact[1], lambda t=torchs: t[1], gradient_floor, shape, unit)

    @pytest.mark.parametrize("magnitude", [100.0, 300.0, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_large_logits(self, backend, dtype, magnitude):
        """Neighbours with large logits of different classes: all of a pixel's powers underflow."""
        logits = magnitude * scores(2, 5, 6, 7, scale=1.0).to(backend.device)
        logits[0] = -magnitude
        logits[0, 0, :, ::2] = magnitude
        logits[0, 1, :, 1::2] = magnitude
        target = targets(2, (43, 50), 5).to(backend.device)
        options = {"ignore_index": 255, "reduction": "none", "label_smoothing": 0.1}
        exact = gradients(reference.upsample_cross_entropy, logits, target, **options)
        torchs = gradients(reference.upsample_cross_entropy, logits.to(dtype), target, **options)
        got = gradients(upsample_cross_entropy, logits.to(dtype), target, **options)
        assert got[0].isfinite().all() and got[1].isfinite().all()
        for k in range(2):
            floor = FLOOR.get(dtype, 1e-6)
            assert_in_budget(got[k], exact[k], lambda k=k: torchs[k], floor, k)
        options["reduction"] = "sum"
        exact = gradients(reference.upsample_cross_entropy, logits, target, **options)
        got = gradients(upsample_cross_entropy, logits.to(dtype), target, **options)
        torchs = gradients(reference.upsample_cross_entropy, logits.to(dtype), target, **options)
        for k in range(2):
            assert_in_budget(got[k], exact[k], lambda k=k: torchs[k], FLOOR.get(dtype, 1e-6), k)

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_not_finite(self, backend, value):
        logits = scores(2, 4, 5, 6).float().to(backend.device)
        logits[0, 1, 2, 3] = value
        target = torch.zeros(2, 17, 19, dtype=torch.long, device=backend.device)
        expected = reference.upsample_cross_entropy(logits, target, reduction="none")
        got = upsample_cross_entropy(logits, target, reduction="none")
        assert torch.equal(got.isnan(), expected.isnan())
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite)
        torch.testing.assert_close(got[finite], expected[finite])
        # A NaN with every bit of its payload set stays one.
        logits[0, 1, 2, 3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
        got = upsample_cross_entropy(logits, target, reduction="none")
        expected = reference.upsample_cross_entropy(logits, target, reduction="none")
        assert torch.equal(got.isnan(), expected.isnan())

    def test_ignored_pixels_take_no_part(self, backend):
        logits = scores(1, 4, 5, 6).float().to(backend.device)
        logits[:, :, :, 3:] = NAN
        target = torch.full((1, 20, 24), 255, device=backend.device)
        target[:, :, :8] = 1
        loss, gradient = gradients(upsample_cross_entropy, logits, target, ignore_index=255)
        assert loss.isfinite() and gradient.isfinite().all()

    def test_all_ignored(self, backend):
        logits = scores(2, 3, 4, 5).float().to(backend.device)
        target = torch.full((2, 16, 20), 7, device=backend.device)
        for reduction, value in [("mean", NAN), ("sum", 0.0), ("mean_all", 0.0), ("none", 0.0)]:
            options = {"reduction": reduction, "ignore_index": 7}
            loss, gradient = gradients(upsample_cross_entropy, logits, target, **options)
            expected = torch.full(loss.shape, value, device=backend.device)
            assert torch.equal(loss.isnan(), expected.isnan())
            assert not gradient.any()
            if reduction != "mean":
                assert not loss.any()

    def test_label_types(self, backend):
        logits = scores(2, 21, 9, 8).float().to(backend.device)
        target = targets(2, (36, 31), 21, ignored=100).to(backend.device)
        expected = gradients(upsample_cross_entropy, logits, target, ignore_index=100)
        kinds = [torch.uint8, torch.int8, torch.int16, torch.int32]
        kinds += [torch.uint16, torch.uint32, torch.uint64]
        for kind in kinds:
            got = gradients(upsample_cross_entropy, logits, target.to(kind), ignore_index=100)
            assert all(map(same_bits, got, expected)), kind
        negative = target.where(target != 100, -1)
        for kind in [torch.int8, torch.int16, torch.int32, torch.int64]:
            got = gradients(upsample_cross_entropy, logits, negative.to(kind), ignore_index=-1)
            assert all(map(same_bits, got, expected)), kind
        # A class that is ignored.
        some = upsample_cross_entropy(logits, target % 21, ignore_index=3)
        other = reference.upsample_cross_entropy(logits, target % 21, ignore_index=3)
        torch.testing.assert_close(some, other)

    def test_counts(self, backend):
        for shape, size in SHAPES:
            logits = scores(*shape).to(backend.device)
            target = targets(shape[0], size, shape[1]).to(backend.device)
            for weight in (None, torch.rand(shape[1], dtype=torch.float64).to(backend.device)):
                for reduction in ("mean", "none"):
                    options = {"weight": weight, "ignore_index": 255, "reduction": reduction}
                    out = upsample_cross_entropy(logits, target, return_counts=True, **options)
                    expected = reference.upsample_cross_entropy(
                        logits, target, return_counts=True, **options
                    )
                    assert out.correct.dtype == out.valid.dtype == torch.int64
                    assert (out.correct, out.valid) == (expected[1], expected[2]), shape
                    assert same_bits(out.loss, upsample_cross_entropy(logits, target, **options))

    def test_layouts(self, backend):
        logits = scores(2, 21, 9, 11).float().to(backend.device)
        target = targets(2, (37, 50), 21).to(backend.device)
        factor = torch.rand(2, 37, 50).to(backend.device)
        options = {"ignore_index": 255, "label_smoothing": 0.1}
        expected = gradients(upsample_cross_entropy, logits, target, pixel_weight=factor, **options)
        for (name, x), (_, t), (_, w) in zip(
            layouts(logits),
            layouts(target.unsqueeze(1)),
            layouts(factor.unsqueeze(1)),
            strict=True,
        ):
            leaf = x.detach().requires_grad_()
            loss = upsample_cross_entropy(leaf, t.squeeze(1), pixel_weight=w.squeeze(1), **options)
            (gradient,) = torch.autograd.grad(loss * 2, leaf)
            assert same_bits(loss, expected[0]), name
            if name in CHANNELS_LAST:
                assert gradient.is_contiguous(memory_format=torch.channels_last)
            else:
                assert gradient.is_contiguous(), name
            reference_gradient = torch.autograd.grad(
                2 * upsample_cross_entropy(leaf, target, pixel_weight=factor, **options), leaf
            )[0]
            assert same_bits(gradient, reference_gradient), name
        same = torch.zeros((), dtype=torch.long, device=backend.device).expand(2, 37, 50)
        assert same_bits(
            upsample_cross_entropy(logits, same), upsample_cross_entropy(logits, same.contiguous())
        )
        number = one_number((2, 21, 9, 11)).to(backend.device).requires_grad_()
        assert abs(upsample_cross_entropy(number, target % 21).item() - math.log(21)) < 1e-6

    def test_upstream_gradient(self, backend):
        logits = scores(1, 5, 4, 4).to(backend.device)
        target = targets(1, (9, 9), 5).to(backend.device)
        plain = gradients_of(logits, target, 1.0)
        assert torch.equal(gradients_of(logits, target, 0.25), 0.25 * plain)
        x = logits.clone().requires_grad_()
        loss = upsample_cross_entropy(x, target, ignore_index=255)
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, x)[0], first)

    def test_sizes(self, backend):
        logits = torch.zeros(0, 3, 4, 5, device=backend.device, requires_grad=True)
        target = torch.zeros(0, 8, 9, dtype=torch.long, device=backend.device)
        for reduction, nan in [("mean", True), ("sum", False), ("mean_all", True)]:
            loss = upsample_cross_entropy(logits, target, reduction=reduction)
            assert bool(loss.isnan()) == nan
            assert torch.autograd.grad(loss, logits)[0].shape == (0, 3, 4, 5)
        assert upsample_cross_entropy(logits, target, reduction="none").shape == (0, 8, 9)

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_all"])
    def test_no_class(self, backend, reduction):
        """An exception on the CPU; on a GPU, which nobody waits for, NaN."""
        logits = scores(1, 3, 6, 7).to(backend.device)
        target = targets(1, (24, 28), 3).to(backend.device)
        target[0, 14, 17] = 3
        options = {"ignore_index": 255, "reduction": reduction}
        if backend.name == "cpu":
            with pytest.raises(ValueError, match=r"target must be in \[0, 3\) or ignore_index 255"):
                upsample_cross_entropy(logits, target, **options)
            return
        loss, gradient = gradients(upsample_cross_entropy, logits, target, **options)
        target[0, 14, 17] = 255
        known, known_gradient = gradients(upsample_cross_entropy, logits, target, **options)
        if reduction == "none":
            assert loss[0, 14, 17].isnan()
            loss[0, 14, 17] = 0
            assert same_bits(loss, known)
        else:
            assert loss.isnan()
        touched = gradient.isnan()
        assert touched[0, :, 3:5, 3:5].all() and int(touched.sum()) == 12
        assert torch.equal(gradient[~touched], known_gradient[~touched])

    def test_errors(self):
        logits, target = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 9, dtype=torch.long)
        weight = torch.ones(3)
        cases = [
            (dict(logits=logits[0]), ValueError, "logits must have a shape out of (N, C, H, W)"),
            (dict(target=target.float()), TypeError, "target must be of an integer dtype, got"),
            (dict(target=target > 0), TypeError, "target must be of an integer dtype, got torch.b"),
            (dict(target=None), TypeError, "target must be a tensor, got None"),
            (dict(target=target[:1]), ValueError, "target must have shape (N, H, W) with N = 2"),
            (dict(target=target[:, :0]), ValueError, "target must have at least one pixel"),
            (dict(target=target + 3), ValueError, "target must be in [0, 3) or ignore_index -100,"),
            (dict(target=target - 1), ValueError, "or ignore_index -100, got -1"),
            (dict(size=(9, 8)), ValueError, "size must be None or that of the target, (8, 9), got"),
            (dict(weight=weight[:2]), ValueError, "weight must have shape (3,), got (2,)"),
            (
                dict(weight=weight.clone().requires_grad_()),
                NotImplementedError,
                "weight must not require grad",
            ),
            (dict(pixel_weight=weight), ValueError, "pixel_weight must have shape (2, 8, 9), got"),
            (
                dict(pixel_weight=weight, reduction="none"),
                ValueError,
                "pixel_weight must have shape (2, 8, 9), got (3,)",
            ),
            (dict(reduction="avg"), ValueError, "reduction must be one of 'none', 'sum'"),
            (dict(ignore_index=0.5), TypeError, "ignore_index must be an integer, got float"),
            (dict(label_smoothing=1.5), ValueError, "label_smoothing must be in [0, 1], got 1.5"),
            (dict(label_smoothing=NAN), ValueError, "label_smoothing must be in [0, 1], got nan"),
            (dict(label_smoothing="0"), TypeError, "label_smoothing must be a number, got str"),
        ]
        for change, error, text in cases:
            options = {"logits": logits, "target": target, **change}
            with pytest.raises(error) as caught:
                upsample_cross_entropy(**options)
            assert str(caught.value).startswith("upsample_cross_entropy: "), caught.value
            assert text in str(caught.value)
        bad = target.clone()
        bad[1, 7, 8] = 77
        with pytest.raises(ValueError, match="or ignore_index 255, got 77"):
            upsample_cross_entropy(logits, bad, ignore_index=255)


def gradients_of(logits, target, factor):
    x = logits.clone().requires_grad_()
    (upsample_cross_entropy(x, target, ignore_index=255) * factor).backward()
    return x.grad


@settings(max_examples=150)
@given(
    n=st.integers(1, 2),
    c=st.integers(1, 40),
    h=st.integers(1, 20),
    w=st.integers(1, 40),
    height=st.integers(1, 60),
    width=st.integers(1, 90),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    backend, n, c, h, w, height, width, align_corners, channels_last, smoothing, seed
):
    logits = scores(n, c, h, w, seed=seed).to(backend.device)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    target = targets(n, (height, width), c, seed=seed).to(backend.device)
    options = {
        "align_corners": align_corners,
        "ignore_index": 255,
        "label_smoothing": smoothing,
        "reduction": "sum",
    }
    exact = gradients(reference.upsample_cross_entropy, logits, target, **options)
    got = gradients(upsample_cross_entropy, logits, target, **options)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    single = logits.float()
    labels = upsample_argmax(single, (height, width), align_corners)
    upsampled = upsample(logits, (height, width), align_corners)
    chosen = upsampled.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert (upsampled.amax(1) - chosen <= 1e-4).all()
