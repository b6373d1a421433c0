# SPDX-License-Identifier: Apache-2.0
"""CRF-as-RNN: counts, names, the recurrence behind FCN-8s, twins, sizes, training, compile."""

from __future__ import annotations

import pytest
import torch
from _models import check_graph
from _networks import check_errors, check_twins, count, fill
from _ops import one_thread as one_thread
from _ops import random
from torch import nn

from pydense.models import FCN, FCNCRFasRNN, crf_as_rnn_vgg16, reference_twin
from pydense.ops import dense_crf

NARROW = {"fc_channels": 64}


def narrow(model):
    """An eighth of the channels: what a padding of 100 on all sides costs is that much less."""
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels // 8 or layer.in_channels
            outputs = layer.out_channels // 8 or layer.out_channels
            model.add_module(name, nn.Conv2d(inputs, outputs, layer.kernel_size, 1, layer.padding))
    return model.eval()


def make(**options):
    """Of few channels, and a CRF whose parameters are no multiples of the unit matrix."""
    model = fill(narrow(FCNCRFasRNN(4, **NARROW, **options)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("upscore2.bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            elif name.startswith("crfrnn"):
                p.copy_(torch.eye(4) + 0.1 * torch.randn(p.shape, generator=generator))
        for name in ("score_fr", "score_pool3", "score_pool4"):
            model.get_submodule(name).weight *= 0.1
    return model


@pytest.fixture(scope="module")
def small():
    return make(crf={"bilateral_srgb": 1.0, "bilateral_sxy": 20.0})


def picture(*size, seed=0):
    return 2 * random(1, 3, *size, seed=seed)


def test_counts():
    """With fixed deconvolutions: FCN-8s's without theirs, and three matrices of the CRF."""
    fixed = 134_489_759 - 21**2 * (4**2 + 4**2 + 16**2) + 3 * 21**2
    assert count(crf_as_rnn_vgg16, upsampling="bilinear") == fixed


def test_names(small):
    """Of the PyTorch port: FCN-8s's and three."""
    state = small.state_dict()
    own = set(FCN(4, **NARROW, upsampling="learned").state_dict())
    assert set(state) - own == {
        "upscore2.bias",
        "crfrnn.spatial_ker_weights",
        "crfrnn.bilateral_ker_weights",
        "crfrnn.compatibility_matrix",
    }
    assert state["upscore2.bias"].shape == (4,)


def test_definition(small):
    """FCN-8s with the bias, then ten updates in eval and five in training."""
    x = picture(40, 51)
    network = narrow(FCN(4, **NARROW, upsampling="learned"))
    network.upscore2.bias = nn.Parameter(torch.zeros(4))
    crf = small.crfrnn
    state = small.state_dict()
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("crfrnn")})
    with torch.no_grad():
        unary = network(x)
        assert torch.equal(small.unary(x), unary)
        found = []
        for mode, iterations in ((True, 5), (False, 10)):
            small.train(mode)
            for layer in (small.drop6, small.drop7):
                layer.eval()
            expected = dense_crf(
                unary,
                x,
                gaussian={"sxy": 3, "compat": crf.compatibility_matrix @ crf.spatial_ker_weights},
                bilateral={
                    "sxy": 20,
                    "srgb": 1,
                    "compat": crf.compatibility_matrix @ crf.bilateral_ker_weights,
                },
                iterations=iterations,
                normalization="after",
                output="logits",
            )
            found.append(small(x))
            assert torch.allclose(found[-1], expected, rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert (found[1] - unary).abs().max() > 0.1


def test_twins():
    """The gradient by the picture aside: a CRF's is an estimate of its own, see ``dense_crf``."""
    check_twins(make(iterations=(2, 2), crf={"bilateral_srgb": 1.0}), (36, 41), of_picture=False)


def test_sizes(small):
    for size in ((33, 40), (64, 64), (97, 45)):
        x = picture(*size, seed=sum(size))
        with torch.no_grad():
            logits = small(x)
        assert logits.shape == (1, 4, *size)
        labels, sure = small.predict(x, return_confidence=True)
        assert torch.equal(labels, logits.argmax(1))
        assert torch.allclose(sure, logits.softmax(1).amax(1), atol=1e-5)


def test_training():
    """All parameters, those of both parts, learn from one loss."""
    model = make(dropout="element")
    model.train()
    target = torch.randint(4, (1, 40, 51), generator=torch.manual_seed(4))
    target[0, :9, :9] = 255
    model.loss(picture(40, 51), target).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_bilinear_is_the_published_filter():
    """The fixed form is the learned one at its start, and loads it."""
    learned = make()
    with torch.no_grad():
        learned.upscore2.bias.zero_()
    fixed = narrow(FCNCRFasRNN(4, **NARROW, upsampling="bilinear"))
    for name in ("upscore2", "upscore_pool4", "upscore8"):
        learned.get_submodule(name).reset_parameters()
    fixed.load_state_dict(learned.state_dict())
    x = picture(40, 51)
    with torch.no_grad():
        assert torch.allclose(fixed(x), learned(x), rtol=1e-4, atol=1e-3)


def test_graphs(small):
    """The lattice's size is known to its points alone; it is a symbol of the exported graph."""
    check_graph(small.eval(), (40, 51))


def test_features_only():
    model = FCNCRFasRNN(4, **NARROW, features_only=True)
    assert not any(k.startswith(("fc", "score", "upscore", "crf")) for k in model.state_dict())
    maps = model.eval()(picture(64, 64))
    assert [tuple(y.shape[1:]) for y in maps.values()] == [(256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert reference_twin(model)(picture(64, 64)).keys() == maps.keys()


def test_errors():
    check_errors(FCNCRFasRNN, {"iterations": (1,), "upsampling": "none", "dropout": 0.5})
    check_errors(FCNCRFasRNN, {"iterations": (1, -1), "reference": 1})
