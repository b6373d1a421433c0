# SPDX-License-Identifier: Apache-2.0
"""SegmentationLoss and OhemCrossEntropy against their definitions in plain torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _heads import scores, targets
from _ops import one_thread as one_thread
from _ops import same_bits
from torch.nn import functional

from pydense.nn import OhemCrossEntropy, SegmentationLoss
from pydense.reference.segmentation_head import ohem_weight, upsample, upsample_cross_entropy

SIZE = (37, 50)


def loss_and_gradient(loss, *outputs):
    leaves = [x.detach().clone().requires_grad_() for x in outputs]
    value = loss(leaves if len(leaves) > 1 else leaves[0])
    return value.detach(), torch.autograd.grad(value, leaves)


def assert_equal(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


class TestSegmentationLoss:
    @pytest.mark.parametrize("reduction", ["mean", "mean_all", "sum"])
    def test_two_outputs(self, backend, reduction):
        target, weight = targets(2, SIZE, 5).to(backend.device), [0.5, 1.0, 2.0, 0.25, 1.5]
        loss = SegmentationLoss(weight, 255, True, 0.125, reduction, (0.4, 1.0)).to(backend.device)
        auxiliary = scores(2, 5, 4, 5).to(backend.device)
        main = scores(2, 5, 9, 12, seed=5).to(backend.device)

        def expected(outputs):
            return sum(
                factor
                * upsample_cross_entropy(
                    x,
                    target,
                    align_corners=True,
                    weight=torch.tensor(weight).to(x),
                    ignore_index=255,
                    label_smoothing=0.125,
                    reduction=reduction,
                )
                for factor, x in zip((0.4, 1.0), outputs, strict=True)
            )

        got = loss_and_gradient(lambda x: loss(x, target), auxiliary, main)
        assert_equal(got, loss_and_gradient(expected, auxiliary, main))
        value, correct, valid = loss((auxiliary, main), target, return_counts=True)
        assert same_bits(value, got[0])
        labels = upsample(main, SIZE, True).argmax(1)
        assert correct == ((labels == target) & (target != 255)).sum()
        assert valid == (target != 255).sum()

    def test_module(self):
        loss = SegmentationLoss([1.0, 2.0], ignore_index=255, output_weights=(0.4, 1))
        assert loss.state_dict() == {} and "output_weights=(0.4, 1.0)" in repr(loss)
        x, target = [scores(1, 2, 3, 3), scores(1, 2, 4, 4)], targets(1, (9, 9), 2)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.half().float()):
            assert same_bits(other(x, target), loss(x, target))
        factor = torch.full((1, 9, 9), 3.0)
        summed = SegmentationLoss(reduction="sum", ignore_index=255)
        torch.testing.assert_close(
            summed(x[0], target, pixel_weight=factor), 3 * summed(x[0], target)
        )

    def test_class_weights_keep_float64(self):
        weight = torch.tensor([0.1, 0.7], dtype=torch.float64)
        x, target = scores(1, 2, 4, 4), targets(1, (9, 9), 2)
        got = SegmentationLoss(weight, 255)(x, target)
        expected = functional.cross_entropy(upsample(x, (9, 9)), target, weight, ignore_index=255)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
        assert SegmentationLoss(weight.half()).weight.dtype == torch.float32

    def test_errors(self):
        with pytest.raises(ValueError, match=r"SegmentationLoss: weight must have shape \(C,\)"):
            SegmentationLoss(torch.ones(2, 2))
        with pytest.raises(ValueError, match="SegmentationLoss: reduction must be one of 'sum'"):
            SegmentationLoss(reduction="none")
        for options, error, text in [
            ({"weight": "heavy"}, TypeError, "weight must be a tensor or a sequence of numbers"),
            ({"weight": [1j]}, TypeError, "weight must hold real numbers, got torch.complex64"),
            ({"output_weights": 1.0}, TypeError, "output_weights must be a sequence of numbers"),
            ({"output_weights": "ab"}, TypeError, "output_weights must be a sequence of numbers"),
            ({"output_weights": ()}, ValueError, "output_weights must hold at least one number"),
            ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
        ]:
            for kind in (SegmentationLoss, OhemCrossEntropy):
                with pytest.raises(error, match=f"^{kind.__name__}: {text}"):
                    kind(**options)
        with pytest.raises(ValueError, match="outputs must be 2, one for each output weight, got"):
            SegmentationLoss(output_weights=(1, 1))(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3))


def mined(definition, threshold, min_kept, target, weight, avg_non_ignore=False):
    """The loss of one output by its definition, with sorts and logits of full resolution."""

    def loss(x):
        full = upsample(x, target.shape[1:])
        kept = ohem_weight(
            full.detach(),
            target,
            definition=definition,
            threshold=threshold,
            min_kept=min_kept,
            ignore_index=255,
            weight=weight,
        )
        each = functional.cross_entropy(
            full, target, weight=weight, ignore_index=255, reduction="none"
        )
        if definition == "hrnet":
            return each[kept > 0].mean()
        count = (target != 255).sum() if avg_non_ignore else target.numel()
        return (each * kept).sum() / count

    return loss


class TestOhem:
    # Few and many hard pixels; fewer pixels than are to be kept.
    @pytest.mark.parametrize("threshold", [0.02, 0.5, 0.95])
    @pytest.mark.parametrize("min_kept", [1, 300, 1500, 100000])
    @pytest.mark.parametrize("definition", ["hrnet", "mmseg"])
    def test_threshold(self, backend, definition, min_kept, threshold):
        x = scores(2, 5, 9, 12, scale=2.0).to(backend.device)
        target = targets(2, SIZE, 5).to(backend.device)
        weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5]).to(x)
        options = {"ignore_index": 255, "definition": definition, "weight": weight}
        loss = OhemCrossEntropy(threshold, min_kept, **options)
        expected = mined(definition, threshold, min_kept, target, weight)
        got = loss_and_gradient(lambda x: loss(x, target), x)
        assert_equal(got, loss_and_gradient(expected, x))

    @pytest.mark.parametrize("avg_non_ignore", [False, True])
    @pytest.mark.parametrize("min_kept", [1, 300, 5000])
    def test_largest_losses(self, backend, min_kept, avg_non_ignore):
        x = scores(2, 5, 9, 12).to(backend.device)
        target = targets(2, SIZE, 5).to(backend.device)
        weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5]).to(x)
        loss = OhemCrossEntropy(
            None, min_kept, weight, 255, definition="mmseg", avg_non_ignore=avg_non_ignore
        )
        expected = mined("mmseg", None, min_kept, target, weight, avg_non_ignore)
        got = loss_and_gradient(lambda x: loss(x, target), x)
        assert_equal(got, loss_and_gradient(expected, x))

    def test_outputs(self, backend):
        """HRNet's OCR: all pixels of the auxiliary output; mmsegmentation mines each."""
        target = targets(2, SIZE, 5).to(backend.device, torch.uint8)
        outputs = [x.to(backend.device) for x in (scores(2, 5, 4, 5), scores(2, 5, 9, 12, seed=4))]
        weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5]).to(outputs[0])
        for definition in ("hrnet", "mmseg"):
            options = {"ignore_index": 255, "definition": definition, "weight": weight}
            one = OhemCrossEntropy(0.6, 100, **options)
            both = OhemCrossEntropy(0.6, 100, output_weights=(0.4, 1.0), **options)
            if definition == "hrnet":
                # Its criterion returns the map of the auxiliary losses plus a scalar, and its
                # training loop takes the mean of that.
                full = upsample(outputs[0], SIZE)
                first = functional.cross_entropy(
                    full, target.long(), weight=weight, ignore_index=255, reduction="none"
                )
            else:
                first = one(outputs[0], target)
            expected = (0.4 * first + one(outputs[1], target)).mean()
            torch.testing.assert_close(both(outputs, target), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("definition", ["hrnet", "mmseg"])
    def test_nothing_to_keep(self, backend, definition):
        x = scores(2, 3, 4, 5).to(backend.device)
        target = torch.full((2, *SIZE), 255, device=backend.device)
        loss = OhemCrossEntropy(0.7, 100, ignore_index=255, definition=definition)
        value, (gradient,) = loss_and_gradient(lambda x: loss(x, target), x)
        assert value.isnan() == (definition == "hrnet")
        assert not gradient.any()

    @pytest.mark.parametrize("threshold", [0.7, None])
    def test_nothing_to_keep_of_those_not_ignored(self, backend, threshold):
        """mmsegmentation's epsilon in the divisor: 0, not NaN."""
        x = scores(2, 3, 4, 5).to(backend.device)
        target = torch.full((2, *SIZE), 255, device=backend.device)
        loss = OhemCrossEntropy(threshold, 100, None, 255, definition="mmseg", avg_non_ignore=True)
        value, (gradient,) = loss_and_gradient(lambda x: loss(x, target), x)
        assert value == 0 and not gradient.any()

    @pytest.mark.parametrize(
        ("definition", "threshold"), [("hrnet", 0.7), ("mmseg", 0.7), ("mmseg", None)]
    )
    def test_no_images(self, backend, definition, threshold):
        """The mean over nothing, as in torch."""
        loss = OhemCrossEntropy(threshold, 100, definition=definition)
        x = torch.zeros(0, 3, 4, 5, device=backend.device)
        target = torch.zeros(0, 8, 10, dtype=torch.long, device=backend.device)
        value, (gradient,) = loss_and_gradient(lambda x: loss(x, target), x)
        assert value.isnan() and gradient.shape == x.shape

    @pytest.mark.parametrize(
        ("kind", "label", "ignored"),
        [(torch.uint8, 156, -100), (torch.uint8, 255, -1), (torch.int8, 100, 356)],
    )
    def test_ignored_label_beyond_the_dtype(self, backend, kind, label, ignored):
        """A label that equals the ignored one only where that wraps is a label."""
        x = scores(1, 256, 4, 5).to(backend.device)
        target = torch.full((1, 8, 10), label, device=backend.device)
        for options in (
            {"threshold": 0.7},
            {"threshold": 0.7, "definition": "mmseg", "avg_non_ignore": True},
            {"threshold": None, "definition": "mmseg"},
        ):
            loss = OhemCrossEntropy(min_kept=30, ignore_index=ignored, **options)
            assert loss(x, target) > 0
            assert same_bits(loss(x, target.to(kind)), loss(x, target))

    def test_compile(self, backend):
        target = targets(2, SIZE, 5).to(backend.device)
        for definition in ("hrnet", "mmseg"):
            loss = OhemCrossEntropy(0.6, 100, [1.0] * 5, 255, definition=definition)
            loss = loss.to(backend.device)
            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
            x = scores(2, 5, 9, 12).float().to(backend.device)
            got = loss_and_gradient(lambda x, f=compiled: f(x, target), x)
            expected = loss_and_gradient(lambda x, f=loss: f(x, target), x)
            assert same_bits(got[0], expected[0]) and same_bits(got[1][0], expected[1][0])

    def test_module(self):
        text = repr(OhemCrossEntropy(None, definition="mmseg", ignore_index=255))
        assert "threshold=None, min_kept=100000, definition='mmseg', avg_non_ignore=False" in text
        assert OhemCrossEntropy(weight=[1.0, 2.0]).state_dict() == {}

    def test_errors(self):
        cases = [
            ({"threshold": 1.5}, "threshold must be in"),
            ({"threshold": None}, "threshold must be a number with definition 'hrnet', got None"),
            ({"min_kept": 0}, "min_kept must be in"),
            ({"definition": "caffe"}, "definition must be one of 'hrnet', 'mmseg', got 'caffe'"),
            ({"avg_non_ignore": True}, "avg_non_ignore must be False with definition 'hrnet'"),
        ]
        for options, text in cases:
            with pytest.raises(ValueError, match=f"OhemCrossEntropy: {text}"):
                OhemCrossEntropy(**options)
