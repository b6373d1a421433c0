# SPDX-License-Identifier: Apache-2.0
"""DeepLab v3's head: names, training and inference equal to torchvision's; whole models."""

from __future__ import annotations

import copy
import pickle

import _deeplab
import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random, same_bits
from torch import nn

from benchmarks._torchvision import segmentation_models
from pydense.nn import ASPP, AtrousConv2d, convert, fold_batchnorm
from pydense.nn.aspp_concat import is_aspp

RATES = (2, 5, 40)


def heads(dtype=torch.float32):
    theirs = _deeplab.ASPP(12, RATES, 8)
    _deeplab.fill_norms(theirs)
    own = ASPP(12, RATES, 8)
    own.load_state_dict(theirs.state_dict())
    assert [*own.state_dict()] == [*theirs.state_dict()]
    return own.to(dtype), theirs.to(dtype)


class TestASPP:
    @pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("mode", ["training", "eval", "frozen norms", "on a hook"])
    def test_equals_torchvisions(self, mode, form):
        """Output, gradients and buffers; without dropout, which is random."""
        own, theirs = heads()
        results = []
        for model in (own, theirs):
            model.project[3].p = 0.0
            model.train(mode in ("training", "frozen norms"))
            if mode == "frozen norms":
                for layer in model.modules():
                    if isinstance(layer, nn.BatchNorm2d):
                        layer.eval()
            calls = []
            if mode == "on a hook":
                model.convs[1][1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
            x = random(2, 12, 13, 11).contiguous(memory_format=form).requires_grad_()
            out = model(x)
            out.backward(random(*out.shape, seed=3))
            grads = [p.grad for p in model.parameters()]
            results.append([out.detach(), x.grad, *grads, *model.buffers()])
            assert calls == [1] * (mode == "on a hook")
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    def test_fused_in_eval_alone(self):
        own, _ = heads()
        x = random(1, 12, 9, 9).requires_grad_()
        names = []
        for training in (False, True):
            own.train(training)
            node, found = own(torch.cat([x, x])).grad_fn, ""
            while node is not None:
                found += node.name()
                node = node.next_functions[0][0] if node.next_functions else None
            names.append("aspp_concat" in found)
        assert names == [True, False]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype):
        own, theirs = heads(dtype)
        x = random(1, 12, 13, 11).to(dtype)
        with torch.no_grad():
            a, b = own.eval()(x), theirs.eval()(x)
            exact = theirs.double()(x.double())
        assert a.dtype == dtype
        error, torchs = (float((t.double() - exact).abs().max()) for t in (a, b))
        assert error <= 2 * torchs + (8 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_are_packed_once(self, dtype):
        """The same bits as of weights that are packed in every call; a new weight counts."""
        head = ASPP(128, (16, 18), 8).eval().requires_grad_(False).to(dtype)
        x = random(1, 128, 17, 17).to(dtype)
        convs = [head.convs[i][0] for i in (1, 2)]
        plain = [conv.weight_cache() for conv in convs]
        assert not any(cache._kept for cache in plain)
        first = head(x)
        kept = [conv.weight_cache()._kept for conv in convs]
        assert all(kept)
        assert same_bits(head(x), first)
        assert all(a is conv.weight_cache()._kept for a, conv in zip(kept, convs, strict=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AtrousConv2d, "weight_cache", lambda self: None)
            assert same_bits(head(x), first)
        convs[0].weight.mul_(2)
        changed = head(x)
        assert not same_bits(changed, first)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AtrousConv2d, "weight_cache", lambda self: None)
            assert same_bits(head(x), changed)
        x.requires_grad_()
        (own,) = torch.autograd.grad(head(x).sum(), x)
        assert torch.isfinite(own).all() and own.abs().max() > 0

    def test_autocast_and_compile(self):
        own, theirs = heads()
        own.eval()
        theirs.eval()
        x = random(2, 12, 13, 11)
        with torch.no_grad():
            expected = theirs(x)
            with torch.autocast("cpu", torch.bfloat16):
                out = own(x)
            assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), expected, atol=0.1)
            torch._dynamo.reset()
            compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
            assert torch.allclose(compiled(x), expected, atol=1e-4)
            shapes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h")},)
            program = torch.export.export(own, (x,), dynamic_shapes=shapes).module()
            y = random(3, 12, 20, 11)
            assert torch.allclose(program(y), theirs(y), atol=1e-4)

    def test_pickles_and_trains(self):
        own, _ = heads()
        x = random(2, 12, 9, 8)
        assert torch.equal(pickle.loads(pickle.dumps(own.eval()))(x), own(x))
        own.train()
        optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
        own.project[3].p = 0.0
        losses = []
        for _ in range(4):
            loss = own(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"in_channels": 0}, ValueError, "in_channels must be in"),
            ({"out_channels": 1.5}, TypeError, "out_channels must be an integer"),
            ({"atrous_rates": ()}, ValueError, "atrous_rates must be 1 to 63 integers, got 0"),
            ({"atrous_rates": (0,)}, ValueError, r"atrous_rates\[0\] must be in"),
        ],
    )
    def test_bad_arguments(self, change, error, text):
        with pytest.raises(error, match=f"ASPP: {text}"):
            ASPP(**{"in_channels": 2, "atrous_rates": (2,), "out_channels": 2, **change})


class TestConvert:
    def test_head_in_place(self):
        model = nn.Sequential(nn.Conv2d(3, 12, 1), _deeplab.ASPP(12, RATES, 8)).eval()
        _deeplab.fill_norms(model)
        before = copy.deepcopy(model)
        keys, parameters = [*model.state_dict()], [id(p) for p in model.parameters()]
        assert convert(model) is model and isinstance(model[1], ASPP)
        assert [*model.state_dict()] == keys
        assert [id(p) for p in model.parameters()] == parameters
        assert sum(isinstance(m, AtrousConv2d) for m in model.modules()) == len(RATES)
        x = random(2, 3, 17, 15)
        assert torch.allclose(model(x), before(x), atol=1e-4)
        again = [id(m) for m in convert(model).modules()]
        assert again == [id(m) for m in model.modules()]
        alone = convert(copy.deepcopy(before[1]))
        assert isinstance(alone, ASPP)

    def test_what_is_built_otherwise_stays(self):
        def changed(change):
            head = _deeplab.ASPP(12, RATES, 8)
            change(head)
            return head

        for change in (
            lambda head: head.convs[1].__setitem__(2, nn.SiLU()),
            lambda head: head.convs[1].__setitem__(1, nn.GroupNorm(2, 8)),
            lambda head: head.convs[1].__setitem__(0, nn.Conv2d(12, 8, 3, padding=1, stride=2)),
            lambda head: head.convs[4].__setitem__(0, nn.AdaptiveAvgPool2d(2)),
            lambda head: head.convs.append(nn.Identity()),
            lambda head: head.__setattr__("extra", nn.Identity()),
            lambda head: head.__setattr__("project", nn.Identity()),
        ):
            head = changed(change)
            assert not is_aspp(head) and type(convert(head)) is _deeplab.ASPP
            with pytest.raises(TypeError, match="ASPP: module must be built as torchvision's"):
                ASPP.from_module(head)

    def test_torchvisions_deeplab(self):
        """The whole model: the same keys, and outputs to 1e-4."""
        segmentation = segmentation_models()
        if segmentation is None:
            pytest.skip("torchvision is not installed")
        torch.manual_seed(0)
        model = segmentation.deeplabv3_resnet101(
            weights=None, weights_backbone=None, aux_loss=True
        ).eval()
        _deeplab.fill_norms(model, scale=0.8)
        before = copy.deepcopy(model)
        keys = [*model.state_dict()]
        convert(model)
        assert [*model.state_dict()] == keys
        model.load_state_dict(before.state_dict())
        names = [type(m).__name__ for m in model.modules()]
        assert names.count("ASPP") == 1 and names.count("AtrousConv2d") == 28
        x = random(1, 3, 97, 129)
        with torch.no_grad():
            expected = before(x)
            assert 0.1 < expected["out"].std() < 10
            for found in (model(x), fold_batchnorm(model)(x)):
                for key in ("out", "aux"):
                    bound = 1e-4 * max(1.0, float(expected[key].abs().max()))
                    assert float((found[key] - expected[key]).abs().max()) <= bound
        kinds = [type(m).__name__ for m in model.backbone.modules()]
        assert kinds.count("BatchNorm2d") == 0


class Net(nn.Module):
    """Pairs that fold, and all that does not."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.atrous = AtrousConv2d(6, 6, 3, padding=2, dilation=2)
        self.bn2 = nn.BatchNorm2d(6)
        self.relu2 = nn.ReLU()
        self.read_twice = nn.Conv2d(6, 6, 1)
        self.bn3 = nn.BatchNorm2d(6)
        self.called_twice = nn.Conv2d(6, 6, 1)
        self.bn4 = nn.BatchNorm2d(6)
        self.hooked = nn.Conv2d(6, 6, 1)
        self.bn5 = nn.BatchNorm2d(6)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.atrous(x)))
        y = self.read_twice(x)
        x = self.bn3(y) + y
        x = self.called_twice(self.bn4(self.called_twice(x)))
        return self.bn5(self.hooked(x))


class TestFold:
    def test_pairs(self):
        model = Net().eval()
        _deeplab.fill_norms(model)
        before = copy.deepcopy(model)
        assert fold_batchnorm(model) is model
        kinds = {name: type(child).__name__ for name, child in model.named_children()}
        identities = {name for name, kind in kinds.items() if kind == "Identity"}
        assert identities == {"bn1", "bn2", "relu2"}
        assert kinds["atrous"] == "AtrousConv2d" and "activation='relu'" in repr(model.atrous)
        for x in (random(2, 3, 12, 10), random(1, 3, 9, 9, seed=1)):
            assert torch.allclose(model(x), before(x), atol=1e-5)
        fold_batchnorm(model)
        assert torch.allclose(model(x), before(x), atol=1e-5)

    def test_separate_statistics_stay(self):
        """Batch normalisation without buffers takes the batch's statistics, in eval() too."""
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        ).eval()
        assert type(fold_batchnorm(model)[1]) is nn.BatchNorm2d

    def test_activation_before_the_normalisation(self):
        model = nn.Sequential(AtrousConv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        _deeplab.fill_norms(model)
        model[0].activation = "relu"
        x = random(1, 3, 9, 9)
        before = model(x)
        assert type(fold_batchnorm(model)[1]) is nn.BatchNorm2d
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("part", [2, 3, 4])
    def test_parts_in_training_stay(self, part):
        model = nn.Sequential(
            *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
            *(AtrousConv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        ).eval()
        model[part].train()
        layer = model[part]
        fold_batchnorm(model)
        assert type(model[1]) is nn.Identity and model[part] is layer
        assert (type(model[3]) is nn.Identity) == (part == 4)

    @pytest.mark.parametrize("part", [0, 1, 2])
    @pytest.mark.parametrize(
        "hook",
        [
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        ],
    )
    def test_layers_with_hooks_stay(self, hook, part):
        model = nn.Sequential(AtrousConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        layer, calls = model[part], []
        getattr(layer, hook)(lambda *_: calls.append(1))
        fold_batchnorm(model)(random(1, 3, 9, 9).requires_grad_()).sum().backward()
        assert model[part] is layer and calls == [1]

    def test_refused(self):
        with pytest.raises(TypeError, match=r"fold_batchnorm: model must be an nn.Module, got int"):
            fold_batchnorm(3)
        with pytest.raises(ValueError, match=r"fold_batchnorm: model must be in eval\(\)"):
            fold_batchnorm(Net())

        class Branches(nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else -x

        with pytest.raises(ValueError, match=r"fold_batchnorm: model must be one that torch.fx"):
            fold_batchnorm(Branches().eval())
