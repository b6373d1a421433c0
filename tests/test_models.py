# SPDX-License-Identifier: Apache-2.0
"""What all reference models share: names, twins, features, inference over windows and scales."""

from __future__ import annotations

import copy
import doctest
import pickle
import sys
import types

import pytest
import torch
from _models import filled, picture, small_resnet
from torch import nn
from torch.nn.functional import interpolate

import pydense.models
from benchmarks._torchvision import segmentation_models
from pydense import models, ops, reference
from pydense.nn import ASPPSum, SegmentationLoss, UpsampleCrop, use_operators
from pydense.nn._operators import OPERATORS, UsesOperators


def test_importing_pydense_stays_lazy(run_python):
    done = run_python(
        "-c", "import sys, pydense; assert 'torch' not in sys.modules; pydense.models.unet"
    )
    assert done.returncode == 0, done.stderr


def test_names():
    names = models.list_models()
    assert names == sorted(set(names)) and len(names) >= 19
    assert models.list_models("unet*") == ["unet", "unet_bilinear"]
    assert all(getattr(models, name).__name__ == name for name in names)
    assert set(names) < set(models.__all__)
    with torch.device("meta"):
        assert isinstance(models.get_model("unet", num_classes=4), models.UNet)
    with pytest.raises(ValueError, match="get_model: name must be one of list_models"):
        models.get_model("vnet")
    with pytest.raises(ValueError, match="register_model: name must be new"):
        models.register_model(models.unet)


def test_docstrings():
    for name in ("_registry", "", "_base"):
        module = sys.modules["pydense.models" + (f".{name}" if name else "")]
        assert doctest.testmod(module).failed == 0
    assert doctest.testmod(sys.modules["pydense.nn._operators"]).failed == 0


class TestOperators:
    def test_the_twin_calls_nothing_of_pydenses(self, monkeypatch):
        """Also without the compiled library's operators the twin runs."""
        model = filled(models.UNet(3, width=4, bilinear=True))
        twin = models.reference_twin(model)
        for name in ops.__all__:
            if isinstance(getattr(ops, name), types.FunctionType):
                monkeypatch.setattr(ops, name, None)
        assert twin(picture(1, 3, 33, 40)).shape == (1, 3, 33, 40)
        with pytest.raises(TypeError):
            model(picture(1, 3, 33, 40))

    def test_switch_by_the_constructor(self):
        torch.manual_seed(0)
        model = models.unet(3, width=4, reference=True)
        layers = [m for m in model.modules() if isinstance(m, UsesOperators)]
        assert len(layers) == 6 and all(layer.operators is reference for layer in layers)
        assert use_operators(model, "pydense").operators is ops
        with pytest.raises(ValueError, match="use_operators: name must be one of 'pydense'"):
            use_operators(model, "torch")

    def test_copies_and_pickles_keep_it(self):
        layer = use_operators(ASPPSum(4, 2), "reference")
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.operators is reference
        assert ASPPSum(4, 2).operators is ops

    def test_layers(self):
        """Each of pydense.nn's has its twin; their tests have the values."""
        from pydense import nn as layers

        free = {"convert", "fold_batchnorm", "use_operators"}
        for name in set(layers.__all__) - free - {"RefineNetBlock", "ResidualConvUnit"}:
            assert issubclass(getattr(layers, name), UsesOperators), name

    @pytest.mark.parametrize("options", [{}, {"output_weights": (0.4, 1.0)}])
    def test_loss(self, options):
        loss = SegmentationLoss(ignore_index=255, **options)
        outputs = [picture(1, 4, 5, 6, seed=i) for i in range(2)]
        given = outputs if options else outputs[0]
        target = torch.randint(4, (1, 17, 23))
        own = loss(given, target, return_counts=True)
        twin = use_operators(loss, "reference")(given, target, return_counts=True)
        assert torch.allclose(own.loss, twin.loss) and own[1:] == twin[1:]

    def test_upsample_crop(self):
        layer, x = UpsampleCrop(4, 8, offset=3), picture(1, 2, 5, 6)
        own = layer(x, (13, 17))
        assert torch.allclose(own, use_operators(layer, "reference")(x, (13, 17)), atol=1e-6)


class TestBase:
    def test_bad_arguments(self):
        for options, error in (
            ({"num_classes": 0}, ValueError),
            ({"num_classes": 2, "features_only": 1}, TypeError),
            ({"num_classes": 2, "reference": "yes"}, TypeError),
            ({"num_classes": 2, "width": 0}, ValueError),
        ):
            with pytest.raises(error, match="UNet: "):
                models.UNet(**options)
        model = models.UNet(2, width=2)
        with pytest.raises(ValueError, match="reduction must be one of"):
            model.loss(picture(1, 3, 16, 16), torch.zeros(1, 16, 16).long(), reduction="none")

    def test_frozen_norm(self):
        with small_resnet() as depth:
            model = models.DeepLabV2ResNet(3, depth).train()
        assert model.training and model.aspp.training
        assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert all(p.requires_grad for p in model.parameters())
        with small_resnet() as depth:
            free = models.DeepLabV2ResNet(3, depth, frozen_norm=False).train()
        assert all(m.training for m in free.modules())

    def test_predict(self):
        model = filled(models.UNet(4, width=4))
        x = picture(2, 3, 33, 47)
        labels, confidence = model.predict(x, dtype=torch.uint8, return_confidence=True)
        probabilities = model(x).softmax(1)
        assert labels.dtype == torch.uint8
        assert torch.allclose(confidence, probabilities.amax(1), atol=1e-5)
        assert not confidence.requires_grad

    def test_low_resolution(self):
        with small_resnet() as depth:
            model = filled(models.DeepLabV3(5, depth))
        x = picture(1, 3, 65, 97)
        low = model(x, low_resolution=True)
        assert low.shape == (1, 5, 9, 13)
        expected = interpolate(low, (65, 97), mode="bilinear", align_corners=False)
        assert torch.allclose(model(x), expected, atol=1e-5)


class TestFeatures:
    def test_heads_are_left_out(self):
        with small_resnet() as depth:
            model = models.DeepLabV3(5, depth, features_only=True)
            whole = models.DeepLabV3(5, depth)
        assert not any(key.startswith(("classifier", "aux")) for key in model.state_dict())
        maps = filled(model)(picture(1, 3, 65, 97))
        assert [*maps] == ["layer1", "layer2", "layer3", "layer4"]
        assert {k: v.shape[1] for k, v in maps.items()} == model.feature_channels
        assert model.out_channels == [256, 512, 1024, 2048]
        assert [*whole.features(picture(1, 3, 33, 33))] == [*maps]

    @pytest.mark.parametrize(
        "build",
        [
            lambda **o: models.FCN(2, fc_channels=8, **o),
            lambda **o: models.FCNAlexNet(2, fc_channels=8, **o),
            lambda **o: models.DeepLabV2VGG(2, **o),
            lambda **o: models.UNet(2, width=4, **o),
            lambda **o: models.UNet(2, width=4, bilinear=True, **o),
            lambda **o: models.SegNet(2, "basic", **o),
            lambda **o: models.SegNet(2, **o),
        ],
    )
    def test_channels_as_told(self, build):
        model = build(features_only=True).eval()
        with torch.no_grad():
            maps = model(picture(1, 3, 67, 81))
        assert isinstance(maps, dict)
        assert {name: x.shape[1] for name, x in maps.items()} == model.feature_channels
        heights = [x.shape[2] for x in maps.values()]
        assert heights == sorted(heights, reverse=True)  # finest first
        with pytest.raises(AttributeError):
            model.loss(picture(1, 3, 67, 81), torch.zeros(1, 67, 81).long())

    def test_faster_rcnn(self, monkeypatch):
        """Torchvision's detector on the maps, through its feature pyramid."""
        if segmentation_models() is None:
            pytest.skip("torchvision is not installed")
        from torchvision.models.detection import FasterRCNN
        from torchvision.ops import FeaturePyramidNetwork, boxes

        def nms(rectangles, scores, threshold):  # torchvision's own is not built for the CPU here
            order, kept = scores.argsort(descending=True), []
            while len(order):
                kept.append(order[0])
                overlap = boxes.box_iou(rectangles[order[:1]], rectangles[order[1:]])[0]
                order = order[1:][overlap <= threshold]
            return torch.stack(kept) if kept else order

        monkeypatch.setattr(boxes, "nms", nms)

        class Backbone(nn.Module):
            def __init__(self, body):
                super().__init__()
                self.body, self.out_channels = body, 16
                self.pyramid = FeaturePyramidNetwork(body.out_channels, self.out_channels)

            def forward(self, x):
                return self.pyramid(self.body(x))

        with small_resnet() as depth:
            body = models.DeepLabV3(5, depth, output_stride=16, features_only=True)
        from torchvision.models.detection.rpn import AnchorGenerator
        from torchvision.ops import MultiScaleRoIAlign

        torch.manual_seed(0)
        detector = FasterRCNN(
            Backbone(filled(body)),
            3,
            min_size=64,
            max_size=96,
            rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4),
            box_roi_pool=MultiScaleRoIAlign([*body.feature_channels], 3, 2),
            rpn_pre_nms_top_n_test=20,
            rpn_post_nms_top_n_test=10,
            box_score_thresh=0.0,
        ).eval()
        with torch.no_grad():
            (found,) = detector([picture(3, 64, 80).sigmoid()])
        assert found["boxes"].shape[1] == 4 and len(found["boxes"]) == len(found["labels"]) > 0


class TestInference:
    @pytest.fixture
    def model(self):
        with small_resnet() as depth:
            return filled(models.DeepLabV2ResNet(4, depth, msc=False, align_corners=False))

    def test_scales_and_mirror_images(self, model):
        x = picture(2, 3, 41, 50)
        got = models.average_logits(model, x, scales=(0.75, 1.0, 1.5), flip=True)
        expected = 0
        with torch.no_grad():
            for size in ((31, 38), (41, 50), (62, 75)):
                scaled = x
                if size != (41, 50):
                    scaled = interpolate(x, size, mode="bilinear", align_corners=False)
                for low in (model(scaled, True), model(scaled.flip(3), True).flip(3)):
                    expected = expected + interpolate(low, (41, 50), mode="bilinear") / 6
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.std()))

    @pytest.mark.parametrize("average", ["logits", "probabilities"])
    def test_windows(self, model, average):
        x = picture(1, 3, 50, 61)
        got = models.average_logits(model, x, window=(33, 40), stride=(10, 21), average=average)
        total, count = torch.zeros(1, 4, 50, 61), torch.zeros(50, 61)
        with torch.no_grad():
            for top in (0, 10, 17):
                for left in (0, 21):
                    part = model(x[:, :, top : top + 33, left : left + 40])
                    part = part.softmax(1) if average == "probabilities" else part
                    total[:, :, top : top + 33, left : left + 40] += part
                    count[top : top + 33, left : left + 40] += 1
        assert count.min() > 0
        assert torch.allclose(got, total / count, atol=1e-4 * float(total.std()))

    @pytest.mark.parametrize("average", ["logits", "probabilities"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"flip": True},
            {"window": 40},
            {"window": (16, 200), "stride": (16, 200)},
            {"window": (33, 40), "stride": (7, 21), "scales": (0.5, 1.0), "flip": True},
        ],
    )
    def test_labels(self, model, options, average):
        x = picture(2, 3, 67, 61)
        logits = models.average_logits(model, x, average=average, **options)
        labels = models.predict_labels(model, x, average=average, dtype=torch.uint8, **options)
        top = logits.topk(2, 1).values
        sure = top[:, 0] - top[:, 1] > 1e-5 * logits.abs().max()
        assert labels.dtype == torch.uint8 and sure.float().mean() > 0.9
        assert torch.equal(labels[sure].long(), logits.argmax(1)[sure])

    def test_memory_is_bounded(self, model, monkeypatch):
        """No tensor of sums is higher than a window, nor made of every window's logits."""
        heights = []

        def accumulate(dst, *rest, **options):
            heights.append(dst.shape[2])
            return ops.upsample_accumulate(dst, *rest, **options)

        spy = types.SimpleNamespace(**{name: getattr(ops, name) for name in ops.__all__})
        spy.upsample_accumulate = accumulate
        monkeypatch.setitem(OPERATORS, "spy", spy)
        model.operator_set = "spy"
        models.predict_labels(model, picture(1, 3, 120, 40), window=33, stride=20)
        assert len(heights) == 6 * 2 and set(heights) == {33}

    def test_crops_of_a_frame(self):
        """FCN's logits lie in a larger frame; windows and mirror images of them are cropped."""
        model = filled(models.FCNAlexNet(3, fc_channels=8))
        x = picture(1, 3, 70, 50)
        got = models.average_logits(model, x, flip=True)
        with torch.no_grad():
            expected = (model(x) + model(x.flip(3)).flip(3)) / 2
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.std()))

    def test_bad_arguments(self, model):
        x = picture(1, 3, 40, 40)
        for options, text in (
            ({"scales": ()}, "scales must not be empty"),
            ({"scales": (0.0,)}, "scales must"),
            ({"stride": 4}, "stride must be None without window"),
            ({"window": 8, "stride": 9}, "stride must be at most window"),
            ({"window": (8, 8, 8)}, "window must be a number or"),
            ({"average": "mean"}, "average must be one of"),
        ):
            with pytest.raises(ValueError, match=text):
                models.average_logits(model, x, **options)
        with pytest.raises(TypeError, match="flip must be a bool"):
            models.predict_labels(model, x, flip=1)
        # Without windows there is no stride, be there sums or not.
        for more in ({}, {"flip": True}):
            with pytest.raises(ValueError, match="stride must be None without window"):
                models.predict_labels(model, x, stride=7, **more)


def test_public_names_are_documented():
    for name in pydense.models.__all__:
        assert getattr(pydense.models, name).__doc__, name
