# SPDX-License-Identifier: Apache-2.0
"""DeepLab v2 and v3, PSPNet: quirks, results of other packages, twins, sizes.

segmentation_models.pytorch defines one of the networks here, DeepLab v3. Its others of the same
name are not the same: its PSPNet has ResNet's layer2 on top (no dilation), no batch normalisation
behind the mean of all, the means in front of the map, a 1x1 convolution and a 3x3 classifier; its
U-Net an encoder of the ImageNet nets and a decoder that upsamples to the nearest pixel.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from _models import (
    check_any_size,
    check_graph,
    check_inductor,
    check_loss,
    check_twin,
    filled,
    picture,
    small_resnet,
)
from _ops import one_thread as one_thread
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, interpolate

from benchmarks._torchvision import segmentation_models
from pydense import models
from pydense.models import _vgg as vgg
from pydense.models.deeplab_v2 import CRF_RESNET
from pydense.nn import DenseCRF


def v2(**options):
    with small_resnet() as depth:
        return models.DeepLabV2ResNet(4, depth, (2, 5), **options)


def v2_vgg(**options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "CONVOLUTIONS", (1, 1, 1, 1, 1))
        patch.setattr(vgg, "CHANNELS", (4, 4, 8, 8, 12))
        return models.DeepLabV2VGG(4, rates=(3, 6), **options)


def large_fov(**options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "CONVOLUTIONS", (1, 1, 1, 1, 1))
        patch.setattr(vgg, "CHANNELS", (4, 4, 8, 8, 12))
        return models.DeepLabV2VGG(4, "large_fov", **options)


def v3(**options):
    with small_resnet() as depth:
        return models.DeepLabV3(4, depth, **options)


def pspnet(**options):
    with small_resnet() as depth:
        return models.PSPNet(4, depth, **options)


def fcn(**options):
    with small_resnet() as depth:
        return models.FCNResNet(4, depth, **options)


@pytest.fixture
def thin(monkeypatch):
    monkeypatch.setattr(vgg, "CONVOLUTIONS", (1, 1, 1, 1, 1))


FAMILIES = {
    "v2": v2,
    "v2-vgg": v2_vgg,
    "v2-large-fov": large_fov,
    "v3": v3,
    "pspnet": pspnet,
    "fcn": fcn,
}


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_twin(self, thin, family):
        check_twin(FAMILIES[family])

    def test_loss(self, thin, family):
        options = {"shrink_labels": False} if family.startswith("v2") else {}
        check_loss(filled(FAMILIES[family]()), **options)

    def test_graph(self, thin, family):
        options = {"aux": False} if family in ("v3", "pspnet", "fcn") else {}
        check_graph(filled(FAMILIES[family](**options)))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_size(thin, family):
    check_any_size(filled(FAMILIES[family]()), examples=3)


def test_inductor(thin):
    check_inductor(filled(v2_vgg()))


class TestDeepLabV2:
    @pytest.mark.parametrize("align_corners", [True, False])
    def test_scales(self, align_corners):
        """The maximum of the logits of three sizes, each a run of the network of one scale."""
        model = filled(v2(align_corners=align_corners))
        single = v2(msc=False).eval()
        single.load_state_dict(model.state_dict())
        x = picture(1, 3, 65, 50)
        # 50: Caffe's Interp shrinks by 4 to 13, and zooms to 37.
        others = [(49, 37), (33, 25)] if align_corners else [(48, 37), (32, 25)]

        def resized(x, size, **options):
            return interpolate(x, size, mode="bilinear", align_corners=align_corners, **options)

        with torch.no_grad():
            outputs = model.forward_outputs(x)
            expected = [single(x, low_resolution=True)]
            for size, scale in zip(others, (0.75, 0.5), strict=True):
                smaller = resized(x, size)
                if not align_corners:
                    smaller = interpolate(x, scale_factor=scale, mode="bilinear")
                assert tuple(smaller.shape[2:]) == size
                expected.append(single(smaller, low_resolution=True))
            largest = expected[0]
            for row in expected[1:]:
                largest = largest.maximum(resized(row, largest.shape[2:]))
            for a, b in zip(outputs, [*expected, largest], strict=True):
                assert torch.allclose(a, b, atol=1e-4 * float(b.std()), rtol=1e-4)
            full = resized(largest, (65, 50))
            assert torch.allclose(model(x), full, atol=1e-4 * float(full.std()), rtol=1e-4)

    def test_published_sizes_of_scales(self):
        """321 pixels: 241 and 161 of them at the smaller scales, 31 and 21 logits."""
        with FakeTensorMode(), torch.no_grad():
            model = v2()
            rows = model.forward_outputs(torch.empty(1, 3, 321, 321))
        assert [row.shape[2] for row in rows] == [41, 31, 21, 41]

    def test_loss_on_shrunk_labels(self):
        model = filled(v2())
        x = picture(1, 3, 65, 65)
        target = torch.randint(4, (1, 65, 65), generator=torch.Generator().manual_seed(3))
        target[:, :9] = 255
        outputs = model.forward_outputs(x)
        assert [row.shape[2] for row in outputs] == [9, 7, 5, 9]
        # Corners lie on corners: every 8th label, every 64 / 6th, every 16th.
        places = {9: torch.arange(0, 65, 8), 5: torch.arange(0, 65, 16)}
        places[7] = torch.tensor([0, 11, 21, 32, 43, 53, 64])
        expected = sum(
            cross_entropy(
                row, target[:, places[row.shape[2]]][:, :, places[row.shape[3]]], ignore_index=255
            )
            for row in outputs
        )
        assert torch.allclose(model.loss(x, target), expected, rtol=1e-4)
        assert len(model.output_weights) == 4

    def test_loss_on_labels_shrunk_by_centres(self):
        model = filled(v2(msc=False, align_corners=False))
        x = picture(1, 3, 64, 64)
        target = torch.randint(4, (1, 64, 64), generator=torch.Generator().manual_seed(3))
        logits = model(x, low_resolution=True)
        rows = torch.tensor([3, 10, 17, 24, 32, 39, 46, 53, 60])  # floor((i + 1/2) 64 / 9)
        expected = cross_entropy(logits, target[:, rows][:, :, rows])
        assert torch.allclose(model.loss(x, target), expected, rtol=1e-4)

    def test_strides_are_on_the_first_1x1(self):
        model = v2()
        assert model.backbone.layer2[0].conv1.stride == (2, 2)
        assert model.backbone.layer2[0].conv2.stride == (1, 1)
        assert model.backbone.layer3[0].conv2.dilation == (2, 2)
        assert model.backbone.layer4[0].conv2.dilation == (4, 4)
        assert model.backbone.bn1.eps == 1e-5 and model.backbone.bn1.momentum == 0.001

    @pytest.mark.parametrize(
        ("build", "quirks"),
        [
            (v2, {"align_corners": False, "ceil_mode": False, "stride_on": "3x3", "msc": False}),
            (v2_vgg, {"pool5a": False}),
            (v3, {"align_corners": True, "stride_on": "1x1", "first_dilation": "own"}),
            (v3, {"rates": (6, 12, 18)}),
            (pspnet, {"align_corners": False, "stride_on": "1x1", "ceil_mode": True}),
        ],
    )
    def test_quirks_change_results(self, thin, build, quirks):
        """The published default is something else."""
        x = picture(1, 3, 44, 50)
        published = filled(build())
        with torch.no_grad():
            expected = published(x)
            for option, value in quirks.items():
                other = build(**{option: value}).eval()
                other.load_state_dict(published.state_dict())
                assert not torch.allclose(expected, other(x), rtol=1e-3), option

    def test_crf(self):
        model = filled(v2(crf=CRF_RESNET))
        x = picture(1, 3, 40, 50)
        image = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8)
        with torch.no_grad():
            crf = DenseCRF(
                gaussian={"sxy": 1, "compat": 3}, bilateral={"sxy": 67, "srgb": 3, "compat": 4}
            )
            expected = crf(model(x), image)
        assert crf.iterations == 10
        assert torch.equal(model.predict(x, image=image), expected.argmax(1))
        labels, sure = model.predict(x, image=image, dtype=torch.uint8, return_confidence=True)
        assert labels.dtype == torch.uint8 and torch.equal(sure, expected.amax(1))
        assert not any(key.startswith("crf") for key in model.state_dict())
        with pytest.raises(RuntimeError, match="crf must be given"):
            v2().refine(model(x), image)

    def test_bad_arguments(self):
        for build, options, text in (
            (models.DeepLabV2VGG, {"head": "v3"}, "head must be one of"),
            (models.DeepLabV2VGG, {"head": "large_fov", "rates": (1, 2)}, "rates must be 1"),
            (models.DeepLabV2ResNet, {"depth": 18}, "depth must be 50"),
            (models.DeepLabV3, {"output_stride": 4}, "output_stride must be 8 or 16"),
            (models.PSPNet, {"bins": (1, 2, 3)}, "bins must be a number that divides"),
        ):
            with pytest.raises(ValueError, match=text):
                build(2, **options)


class TestTorchvision:
    @pytest.mark.parametrize(
        ("name", "build"),
        [("deeplabv3_resnet50", models.deeplab_v3_resnet50), ("fcn_resnet50", models.fcn_resnet50)],
    )
    def test_equal(self, name, build):
        """The same keys; outputs of both heads in eval() and their gradients in training."""
        segmentation = segmentation_models()
        if segmentation is None:
            pytest.skip("torchvision is not installed")
        torch.manual_seed(0)
        theirs = getattr(segmentation, name)(weights=None, weights_backbone=None, aux_loss=True)
        own = build()
        filled(theirs)
        own.load_state_dict(theirs.state_dict())
        assert [*own.state_dict()] == [*theirs.state_dict()]
        x = picture(2, 3, 49, 67)
        own.eval(), theirs.eval()
        with torch.no_grad():
            expected = theirs(x)
            aux, _ = own.forward_outputs(x)
            pairs = [(own(x), expected["out"]), (own.upsample(aux, (49, 67)), expected["aux"])]
        for a, b in pairs:
            assert (a - b).abs().max() <= 1e-4 * b.std()
        for model in (own, theirs):
            model.train()
            for layer in model.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
        target = torch.randint(21, (2, 49, 67))
        own.loss(x, target).backward()
        found = theirs(x)
        (cross_entropy(found["out"], target) + 0.5 * cross_entropy(found["aux"], target)).backward()
        for (key, a), b in zip(own.named_parameters(), theirs.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-6, key


class TestSegmentationModels:
    @pytest.mark.parametrize("output_stride", [8, 16])
    def test_deeplab_v3(self, output_stride):
        """segmentation_models.pytorch's: names are other, results the same."""
        if importlib.util.find_spec("segmentation_models_pytorch") is None:
            pytest.skip("segmentation_models_pytorch is not installed")
        segmentation_models()  # makes torchvision importable beside a torch of another build
        from segmentation_models_pytorch import DeepLabV3

        torch.manual_seed(0)
        theirs = DeepLabV3(
            "resnet50", encoder_weights=None, encoder_output_stride=output_stride, classes=5
        )
        filled(theirs)
        own = models.deeplab_v3_resnet50(
            5,
            output_stride=output_stride,
            rates=(12, 24, 36),
            aux=False,
            align_corners=True,
            first_dilation="own",
        )
        names = {
            "encoder": "backbone",
            "decoder.aspp": "classifier.0",
            "decoder.conv": "classifier.1",
            "decoder.bn": "classifier.2",
            "segmentation_head.0": "classifier.4",
        }
        state = {}
        for key, value in theirs.state_dict().items():
            start = next(name for name in names if key.startswith(f"{name}."))
            state[names[start] + key[len(start) :]] = value
        own.load_state_dict(state)
        own.eval(), theirs.eval()
        x = picture(1, 3, 64, 96)  # theirs upsamples by a factor
        with torch.no_grad():
            found, expected = own(x), theirs(x)
        assert expected.std() > 0.01
        assert (found - expected).abs().max() <= 1e-4 * expected.std()


class TestPSPNet:
    def test_by_the_book(self):
        """Adaptive means, corners on corners."""
        model = filled(pspnet())
        x = picture(1, 3, 65, 81)
        with torch.no_grad():
            top = model.features(x)["layer4"]
            rows = [top]
            for layers, count in zip(model.ppm.features, (1, 2, 3, 6), strict=True):
                assert layers[0].output_size == count
                row = layers(top)
                rows.append(interpolate(row, top.shape[2:], mode="bilinear", align_corners=True))
            low = model.cls(torch.cat(rows, 1))
            expected = interpolate(low, (65, 81), mode="bilinear", align_corners=True)
            assert torch.allclose(model(x), expected, atol=1e-4 * float(expected.std()))
        assert low.shape == (1, 4, 9, 11)
        assert model.output_weights == (0.4, 1.0) and pspnet(aux=False).output_weights == (1.0,)

    def test_deep_stem_and_dilations(self):
        model = pspnet()
        assert [model.backbone.get_submodule(f"conv{i}").out_channels for i in (1, 2, 3)] == [
            64,
            64,
            128,
        ]
        assert model.backbone.layer3[0].conv2.dilation == (2, 2)
        assert model.backbone.layer4[0].conv2.dilation == (4, 4)
        assert v3().backbone.layer3[0].conv2.dilation == (1, 1)  # torchvision's first block
