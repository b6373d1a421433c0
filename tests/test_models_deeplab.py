# SPDX-License-Identifier: Apache-2.0
"""DeepLab v2 and v3, PSPNet: counts, quirks, torchvision's results, twins, sizes."""

from __future__ import annotations

import pytest
import torch
from _models import (
    check_graph,
    check_inductor,
    check_loss,
    check_size,
    check_twin,
    filled,
    parameters,
    picture,
    sizes,
    small_resnet,
)
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, interpolate

from benchmarks._torchvision import segmentation_models
from pydense import models
from pydense.models import _vgg as vgg
from pydense.models.deeplab_v2 import CRF_RESNET
from pydense.nn import DenseCRF


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("deeplab_v2_resnet101", 44_048_532),
        ("deeplab_v2_resnet101_single_scale", 44_048_532),
        ("deeplab_v2_resnet101_crf", 44_048_532),
        ("deeplab_largefov_vgg16", 20_505_429),
        ("deeplab_v2_vgg16", 37_877_652),
        ("deeplab_v2_vgg16_crf", 37_877_652),
        ("deeplab_v2_vgg16_no_pool5a", 37_877_652),
        ("deeplab_v3_resnet50", 42_004_074),
        ("deeplab_v3_resnet101", 60_996_202),
        ("fcn_resnet50", 35_322_218),
        ("fcn_resnet101", 54_314_346),
        ("pspnet_resnet50", 49_081_578),
        ("pspnet_resnet101", 68_073_706),
    ],
)
def test_counts(name, published):
    assert parameters(name) == published


@pytest.mark.parametrize(
    ("name", "size", "low"),
    [
        ("deeplab_v2_resnet101", (321, 321), (41, 41)),
        ("deeplab_v2_resnet101_single_scale", (500, 375), (63, 48)),
        ("deeplab_v2_resnet101_single_scale", (513, 513), (65, 65)),
        ("deeplab_largefov_vgg16", (321, 320), (41, 41)),
        ("deeplab_v2_vgg16", (33, 200), (5, 26)),
        ("deeplab_v3_resnet50", (513, 225), (65, 29)),
        ("deeplab_v3_resnet101", (33, 200), (5, 25)),
        ("fcn_resnet50", (225, 257), (29, 33)),
        ("fcn_resnet101", (97, 33), (13, 5)),
        ("pspnet_resnet50", (473, 473), (60, 60)),
        ("pspnet_resnet101", (33, 200), (5, 25)),
    ],
)
def test_sizes(name, size, low):
    found = sizes(name, *size)
    classes = found[0][1]
    assert found == ((1, classes, *low), (1, classes, *size))


def v2(**options):
    with small_resnet() as depth:
        return models.DeepLabV2ResNet(4, depth, (2, 5), **options)


def v2_vgg(**options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "CONVOLUTIONS", (1, 1, 1, 1, 1))
        patch.setattr(vgg, "CHANNELS", (4, 4, 8, 8, 12))
        return models.DeepLabV2VGG(4, rates=(3, 6), **options)


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


FAMILIES = {"v2": v2, "v2-vgg": v2_vgg, "v3": v3, "pspnet": pspnet, "fcn": fcn}


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_twin(self, thin, family):
        options = {"aux": False} if family in ("v3", "pspnet", "fcn") else {}
        check_twin(lambda: FAMILIES[family](**options))

    def test_loss(self, thin, family):
        options = {"shrink_labels": False} if family.startswith("v2") else {}
        check_loss(filled(FAMILIES[family]()), **options)

    def test_graph(self, thin, family):
        options = {"aux": False} if family in ("v3", "pspnet", "fcn") else {}
        check_graph(filled(FAMILIES[family](**options)))


@settings(max_examples=5)
@given(st.sampled_from([*FAMILIES]), st.integers(33, 200), st.integers(33, 200))
def test_any_size(family, height, width):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "CONVOLUTIONS", (1, 1, 1, 1, 1))
        check_size(filled(FAMILIES[family]()), height, width)


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

    def test_quirks_change_results(self):
        x = picture(1, 3, 44, 50)
        for build, option, values in (
            (v2, "align_corners", (True, False)),
            (v2, "ceil_mode", (True, False)),
            (v2, "stride_on", ("1x1", "3x3")),
            (v2, "msc", (True, False)),
            (v2_vgg, "pool5a", (True, False)),
        ):
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                patch.setattr(vgg, "CONVOLUTIONS", (1, 1, 1, 1, 1))
                published = filled(build())
                other = build(**{option: values[1]}).eval()
                other.load_state_dict(published.state_dict())
                explicit = build(**{option: values[0]}).eval()
                explicit.load_state_dict(published.state_dict())
                assert torch.equal(published(x), explicit(x)), option
                assert not torch.allclose(published(x), other(x), rtol=1e-3), option

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
