# SPDX-License-Identifier: Apache-2.0
"""FCN-32s, 16s, 8s and FCN-AlexNet: counts, crops, transplanted weights, twins, sizes."""

from __future__ import annotations

import pytest
import torch
from _models import (
    check_any_size,
    check_graph,
    check_inductor,
    check_loss,
    check_twin,
    filled,
    parameters,
    picture,
    sizes,
)
from _ops import one_thread as one_thread
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, local_response_norm, max_pool2d

from pydense import checkpoints
from pydense.models import FCN, FCNAlexNet, fcn, transplant_fc_weights
from pydense.models import _vgg as vgg
from pydense.ops import bilinear_filler

# Published count, and how many of it are in the deconvolutions.
COUNTS = [
    ("fcn32s_vgg16", 136_152_917, 21 * 21 * 64 * 64),
    ("fcn16s_vgg16", 134_815_994, 21 * 21 * (4 * 4 + 32 * 32)),
    ("fcn8s_vgg16", 134_489_759, 21 * 21 * (4 * 4 + 4 * 4 + 16 * 16)),
    ("fcn8s_atonce_vgg16", 134_489_759, 21 * 21 * (4 * 4 + 4 * 4 + 16 * 16)),
    ("fcn_alexnet", 57_037_610, 21 * 63 * 63),
]


@pytest.fixture
def thin(monkeypatch):
    """VGG16 with few channels: the geometry is the same."""
    monkeypatch.setattr(vgg, "CHANNELS", (4, 4, 6, 8, 12))
    monkeypatch.setattr(vgg, "CONVOLUTIONS", (1, 1, 1, 1, 1))


@pytest.mark.parametrize(("name", "published", "deconvolution"), COUNTS)
def test_counts(name, published, deconvolution):
    """With deconvolutions that learn; fixed ones are no parameters (test_models_published)."""
    assert parameters(name) == published - deconvolution
    assert parameters(name, upsampling="learned") == published


@pytest.mark.parametrize("name", [row[0] for row in COUNTS])
@pytest.mark.parametrize("size", [(500, 375), (1, 1)])
def test_sizes(name, size):
    low, full = sizes(name, *size)
    assert full == (1, 21, *size)
    if size == (500, 375):  # the score maps, within a ring
        score = {"fcn32s_vgg16": (16, 12), "fcn16s_vgg16": (34, 26), "fcn_alexnet": (16, 12)}
        rows, columns = score.get(name, (70, 54))
        assert low == (1, 21, rows + 2, columns + 2)


def test_offsets_are_the_published():
    with torch.device("meta"):
        nets = {stride: FCN(2, stride, fc_channels=2) for stride in (32, 16, 8)}
        alexnet = FCNAlexNet(2, fc_channels=2)
    assert [nets[s].get_submodule(nets[s].final).offset for s in (32, 16, 8)] == [19, 27, 31]
    assert [nets[8].crop_pool4.offset, nets[8].crop_pool3.offset] == [5, 9]
    assert alexnet.upscore.offset == 18
    with pytest.raises(ValueError, match="offset must"):  # no whole crop
        FCN(2, 8, padding=1, fc_channels=2)


def by_the_book(model, x):
    """FCN from torch's operators, with whole deconvolutions and the published crops."""
    own = model.state_dict()

    def conv(x, name, **options):
        return conv2d(x, own[f"{name}.weight"], own[f"{name}.bias"], **options)

    def crop(x, offset, like):
        return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]

    def deconv(x, kernel_size, stride):
        weight = bilinear_filler(model.num_classes, kernel_size)
        return conv_transpose2d(x, weight, stride=stride)

    pools, out = [], x
    for stage, count in enumerate(vgg.CONVOLUTIONS):
        for i in range(count):
            out = conv(out, f"conv{stage + 1}_{i + 1}", padding=1 if stage or i else 100).relu()
        out = max_pool2d(out, 2, 2, ceil_mode=True)
        pools.append(out)
    score = conv(conv(conv(out, "fc6").relu(), "fc7").relu(), "score_fr")
    if model.stride == 32:
        return crop(deconv(score, 64, 32), 19, x)
    score = deconv(score, 4, 2)
    fourth = conv(pools[3] * (0.01 if model.at_once else 1), "score_pool4")
    score = score + crop(fourth, 5, score)
    if model.stride == 16:
        return crop(deconv(score, 32, 16), 27, x)
    score = deconv(score, 4, 2)
    third = conv(pools[2] * (0.0001 if model.at_once else 1), "score_pool3")
    return crop(deconv(score + crop(third, 9, score), 16, 8), 31, x)


@pytest.mark.parametrize("size", [(64, 97), (1, 7)])
@pytest.mark.parametrize(("stride", "at_once"), [(32, False), (16, False), (8, False), (8, True)])
def test_by_the_book(thin, stride, at_once, size):
    model = filled(FCN(3, stride, at_once, fc_channels=8))
    x = 20 * picture(2, 3, *size)
    with torch.no_grad():
        expected = by_the_book(model, x)
        assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        learned = FCN(3, stride, at_once, fc_channels=8, upsampling="learned").eval()
        learned.load_state_dict(model.state_dict(), strict=False)
        assert (learned(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(learned(x, low_resolution=True), learned(x))
        assert torch.equal(learned.predict(x), learned(x).argmax(1))


@pytest.mark.parametrize(("norm_first", "ceil_mode"), [(False, True), (True, True), (False, False)])
def test_alexnet_by_the_book(norm_first, ceil_mode):
    model = filled(FCNAlexNet(3, fc_channels=8, norm_first=norm_first, ceil_mode=ceil_mode))
    own, x = model.state_dict(), 50 * picture(1, 3, 70, 95)
    out = x
    for i, (stride, padding, groups) in enumerate(
        ((4, 100, 1), (1, 2, 2), (1, 1, 1), (1, 1, 2), (1, 1, 2))
    ):
        weight, bias = own[f"conv{i + 1}.weight"], own[f"conv{i + 1}.bias"]
        out = conv2d(out, weight, bias, stride, padding, 1, groups).relu()
        if i < 2 and norm_first:
            out = local_response_norm(out, 5)
        if i in (0, 1, 4):
            out = max_pool2d(out, 3, 2, ceil_mode=ceil_mode)
        if i < 2 and not norm_first:
            out = local_response_norm(out, 5)
    for name in ("fc6", "fc7"):
        out = conv2d(out, own[f"{name}.weight"], own[f"{name}.bias"]).relu()
    out = conv2d(out, own["score_fr.weight"], own["score_fr.bias"])
    out = conv_transpose2d(out, bilinear_filler(3, 63, groups=3), stride=32, groups=3)
    expected = out[:, :, 18:88, 18:113]
    with torch.no_grad():
        assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_loads_the_published_keys():
    """39 keys of FCN-8s; the deconvolutions are compared and dropped."""
    model = FCN(2, 8, fc_channels=2)
    published = {f"{key}": torch.randn_like(value) for key, value in model.state_dict().items()}
    for name, size in (("upscore2", 4), ("upscore_pool4", 4), ("upscore8", 16)):
        published[f"{name}.weight"] = bilinear_filler(2, size)
    assert len(published) == 39
    model.load_state_dict(published)
    published["upscore8.weight"] = torch.randn(2, 2, 16, 16)
    with pytest.raises(RuntimeError, match="bilinear filter"):
        model.load_state_dict(published)
    FCN(2, 8, fc_channels=2, upsampling="learned").load_state_dict(published)


def test_scores_start_at_zero_and_deconvolutions_bilinear():
    model = FCN(3, 16, fc_channels=4, upsampling="learned")
    assert not model.score_fr.weight.any() and not model.score_pool4.weight.any()
    assert torch.equal(model.upscore16.weight, bilinear_filler(3, 32))


class TestTransplant:
    def source(self, caffe=True):
        """A VGG16 whose fully connected layers have 6 and 5 outputs of its own."""
        model, generator = FCN(2, 32, fc_channels=6), torch.Generator().manual_seed(4)
        convolutions = [k for k in model.state_dict() if k.startswith("conv")]
        own = {
            key: torch.randn(model.state_dict()[key].shape, generator=generator)
            for key in convolutions
        }
        linear = {
            "fc6.weight": torch.randn(6, 25088, generator=generator),
            "fc6.bias": torch.randn(6, generator=generator),
            "fc7.weight": torch.randn(6, 6, generator=generator),
            "fc7.bias": torch.randn(6, generator=generator),
        }
        if caffe:
            return own | linear
        places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
        named = {
            f"features.{place}.{part}": own[key.rsplit(".", 1)[0] + "." + part]
            for place, key in zip(places, convolutions[::2], strict=True)
            for part in ("weight", "bias")
        }
        for place, name in ((0, "fc6"), (3, "fc7")):
            for part in ("weight", "bias"):
                named[f"classifier.{place}.{part}"] = linear[f"{name}.{part}"]
        return named | {"classifier.6.weight": torch.zeros(9, 6)}

    @pytest.mark.parametrize("caffe", [True, False])
    def test_fully_connected_layers(self, caffe):
        model, source = FCN(2, 32, fc_channels=6), self.source()
        keys = transplant_fc_weights(model, self.source(caffe))
        assert len(keys) == 30 and not any(key.startswith("score") for key in keys)
        for key, value in source.items():
            assert torch.equal(model.state_dict()[key].flatten(), value.flatten()), key
        # A 7x7 map: the convolution is the fully connected layer.
        x = picture(1, 512, 7, 7)
        linear = nn.functional.linear(x.flatten(1), source["fc6.weight"], source["fc6.bias"])
        assert torch.allclose(model.fc6(x).flatten(), linear.flatten(), atol=1e-4)

    @pytest.mark.parametrize("old", [False, True], ids=["today", "four dimensions"])
    @pytest.mark.parametrize("net", ["vgg16", "alexnet"])
    def test_caffe_files(self, net, old, tmp_path):
        """The classifiers' ``.caffemodel``, as read() gives them."""
        build = (lambda: FCN(2, 32, fc_channels=6)) if net == "vgg16" else self.alexnet
        source = {k: v for k, v in build().state_dict().items() if not k.startswith("score")}
        blobs = {}
        for key, value in source.items():
            layer, _, part = key.rpartition(".")
            value = torch.rand_like(value)
            source[key] = value
            if layer.startswith("fc") and part == "weight":
                value = value.flatten(1)
            if old:
                value = value.reshape([1] * (4 - value.dim()) + list(value.shape))
            blobs[f"{layer}.{int(part == 'bias')}"] = value
        blobs["fc8.0"] = torch.zeros(10, 6)
        checkpoints.write(tmp_path / "x.caffemodel", blobs)
        model = build()
        keys = transplant_fc_weights(model, checkpoints.read(tmp_path / "x.caffemodel")[0])
        assert set(keys) == set(source)
        for key, value in source.items():
            assert torch.equal(model.state_dict()[key], value), key

    @staticmethod
    def alexnet():
        return FCNAlexNet(2, fc_channels=6)

    def test_torchvision_alexnet_is_another_net(self):
        assert "torchvision-classifier" not in checkpoints.formats("FCNAlexNet")
        assert "torchvision-classifier" in checkpoints.formats("FCN")

    def test_finer_from_coarser(self):
        coarse = filled(FCN(2, 32, fc_channels=6))
        fine = FCN(2, 16, fc_channels=6)
        keys = transplant_fc_weights(fine, coarse.state_dict())
        assert set(fine.state_dict()) - set(keys) == {"score_pool4.weight", "score_pool4.bias"}
        x = 20 * picture(1, 3, 40, 50)
        with torch.no_grad():  # the score of pool4 is zero at first
            maps = torch.stack([model.eval()(x).flatten() for model in (fine, coarse)])
        assert torch.corrcoef(maps)[0, 1] > 0.95  # upsampled in two steps, and in one

    def test_refuses_what_does_not_fit(self):
        model = FCN(2, 32, fc_channels=6)
        with pytest.raises(ValueError, match="must have 150528 numbers"):
            transplant_fc_weights(model, {"fc6.weight": torch.zeros(6, 9216)})
        with pytest.raises(ValueError, match="state_dict must share names"):
            transplant_fc_weights(model, {"layer1.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match="must have 26 parameters of convolutions"):
            transplant_fc_weights(model, {"features.0.weight": torch.zeros(64, 3, 3, 3)})
        other = {"score_fr.weight": torch.zeros(9, 6, 1, 1), "fc7.bias": torch.ones(6)}
        assert transplant_fc_weights(model, other) == ["fc7.bias"]


@pytest.mark.parametrize(
    "build",
    [lambda: FCN(3, 8, fc_channels=8), lambda: FCNAlexNet(3, fc_channels=8)],
    ids=["fcn", "alexnet"],
)
def test_twin(thin, build):
    check_twin(build)


def test_loss(thin):
    for model in (
        FCN(3, 8, fc_channels=8),
        FCNAlexNet(3, fc_channels=8),
    ):
        check_loss(filled(model))


def test_graph(thin):
    check_graph(filled(FCN(3, 8, fc_channels=8)))


def test_inductor(thin):
    check_inductor(filled(FCN(3, 16, fc_channels=8)))


def test_graph_of_alexnet():
    check_graph(filled(FCNAlexNet(3, fc_channels=8)))


@pytest.mark.parametrize("stride", [8, 16, 32, "alexnet"])
def test_any_size(thin, stride):
    net = FCNAlexNet(3, fc_channels=8) if stride == "alexnet" else FCN(3, stride, fc_channels=8)
    check_any_size(filled(net), examples=3)


def test_options():
    for options, text in (
        ({"stride": 4}, "stride must be 8, 16 or 32"),
        ({"upsampling": "nearest"}, "upsampling must be one of"),
        ({"dropout": "none"}, "dropout must be one of"),
    ):
        with pytest.raises(ValueError, match=text):
            FCN(2, **options)
    assert isinstance(FCN(2, fc_channels=2, dropout="channel").drop6, nn.Dropout2d)
    assert fcn.FCN(2, fc_channels=2, features_only=True).conv1_1.padding == (1, 1)
