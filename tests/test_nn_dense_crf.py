# SPDX-License-Identifier: Apache-2.0
"""pydense.nn.DenseCRF: the same numbers as the functions, and the manners of a module."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from _ops import compats, picture, random, same_bits
from _ops import one_thread as one_thread

import pydense
import pydense.densecrf as dcrf
from pydense.nn import DenseCRF
from pydense.ops import dense_crf, dense_crf_energy, dense_crf_free_energy, dense_crf_steps

DEFAULTS = {
    "gaussian": {"sxy": 3, "compat": 3},
    "bilateral": {"sxy": 80, "srgb": 13, "compat": 10},
}
LOGITS, IMAGE = random(2, 4, 12, 17), picture(2, 3, 12, 17)


def test_defaults_are_those_of_pydensecrf():
    q = DenseCRF()(LOGITS, IMAGE)
    assert same_bits(q, dense_crf(LOGITS, IMAGE, **DEFAULTS))
    model = dcrf.DenseCRF2D(17, 12, 4)
    model.setUnaryEnergy(-LOGITS[0].view(4, -1).numpy())
    model.addPairwiseGaussian(3, 3)
    model.addPairwiseBilateral(80, 13, IMAGE[0].movedim(0, 2).numpy(), 10)
    assert torch.equal(q[0].view(4, -1), torch.from_numpy(model.inference(10)))


@pytest.mark.parametrize("kind", ["potts", "diagonal", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_method_is_its_function(kind, dtype):
    compat = compats(kind, 4)
    shared = {
        "gaussian": {"sxy": (2, 3), "compat": compat},
        "bilateral": {"sxy": 9, "srgb": (13, 12, 11), "compat": 2},
        "normalization": "after",
        "self_term": False,
    }
    extra = random(1, 2, 12, 17, seed=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scaled = extra.to(wide) / torch.tensor([3.0, 0.7], dtype=wide).view(2, 1, 1)
    function = {**shared, "features": [{"features": scaled, "compat": 1.5}]}
    crf = DenseCRF(**shared, features=[{"sigma": (3, 0.7), "compat": 1.5}], iterations=3)
    logits, arguments = LOGITS.to(dtype), (IMAGE, [extra])
    q = crf(logits, *arguments)
    assert q.dtype == dtype
    assert same_bits(q, dense_crf(logits, IMAGE, iterations=3, **function))
    labels = crf.labels(logits, *arguments)
    assert torch.equal(labels, dense_crf(logits, IMAGE, iterations=3, output="labels", **function))
    steps = [*crf.steps(logits, *arguments)]
    expected = [*dense_crf_steps(logits, IMAGE, iterations=3, **function)]
    assert len(steps) == 3 and all(map(same_bits, steps, expected)) and same_bits(steps[-1], q)
    parts = crf.free_energy(q, logits, *arguments)
    assert all(map(torch.equal, parts, dense_crf_free_energy(q, logits, IMAGE, **function)))
    energy = crf.energy(labels, logits, *arguments)
    assert torch.equal(energy, dense_crf_energy(labels, logits, IMAGE, **function))


def test_other_backend_and_volumes():
    logits, image = random(1, 3, 3, 5, 6), picture(1, 1, 3, 5, 6)
    expected = dense_crf(logits, image, backend="exact", **DEFAULTS)
    assert same_bits(DenseCRF(backend="exact")(logits, image), expected)
    assert not torch.equal(DenseCRF()(logits, image), expected)


def test_points():
    logits, features = random(2, 3, 50), random(2, 4, 50, seed=1)
    crf = DenseCRF(None, None, [{"sigma": 2, "compat": [1, 2, 3]}])
    kernel = {"features": features / 2, "compat": [1, 2, 3]}
    assert same_bits(crf(logits, features=[features]), dense_crf(logits, features=[kernel]))


def test_state():
    crf = DenseCRF(features=[{"sigma": 1, "compat": torch.eye(4)}])
    assert not crf.state_dict() and not [*crf.parameters()]
    names = [name for name, _ in crf.named_buffers()]
    assert names == ["gaussian_compat", "bilateral_compat", "features_0_compat"]
    torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), crf).load_state_dict(
        torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)).state_dict()
    )
    assert crf.double().features_0_compat.dtype == torch.float64
    assert crf.to("meta").gaussian_compat.is_meta


def test_the_compatibility_is_a_copy():
    compat = torch.ones(4, requires_grad=True)
    crf = DenseCRF(gaussian={"sxy": 3, "compat": compat})
    before = crf(LOGITS, IMAGE)
    with torch.no_grad():
        compat.fill_(5)
    assert same_bits(crf(LOGITS, IMAGE), before) and not before.requires_grad


def test_copies_and_files():
    crf = DenseCRF({"sxy": (3, 2), "compat": compats("matrix", 4)})
    expected = crf(LOGITS, IMAGE)
    file = io.BytesIO()
    torch.save(crf, file)
    file.seek(0)
    copies = [copy.deepcopy(crf), copy.copy(crf), pickle.loads(pickle.dumps(crf))]
    for other in (*copies, torch.load(file, weights_only=False)):
        assert same_bits(other(LOGITS, IMAGE), expected) and repr(other) == repr(crf)


def test_precision_follows_the_logits_not_the_module():
    crf, wide = DenseCRF(), LOGITS.double()
    assert same_bits(crf(wide, IMAGE), DenseCRF().double()(wide, IMAGE))
    assert same_bits(DenseCRF().half()(LOGITS, IMAGE), crf(LOGITS, IMAGE))  # 3 and 10 are exact


def test_repr():
    assert repr(DenseCRF()) == (
        "DenseCRF(gaussian=dict(sxy=3, compat=3), bilateral=dict(sxy=80, srgb=13, compat=10), "
        "iterations=10, normalization='symmetric', self_term=True, backend='lattice')"
    )
    crf = DenseCRF(None, None, [{"sigma": (1, 0.5), "compat": torch.eye(3)}], 5, None, False)
    assert repr(crf) == (
        "DenseCRF(gaussian=None, bilateral=None, "
        "features=[dict(sigma=(1, 0.5), compat=tensor(3, 3))], "
        "iterations=5, normalization=None, self_term=False, backend='lattice')"
    )


def test_the_defaults_cannot_be_changed_by_a_model():
    DenseCRF().gaussian["sxy"] = 5.0
    assert DenseCRF().gaussian == {"sxy": 3.0}


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"gaussian": 3}, TypeError, "gaussian must be a dict with sxy and compat, got int"),
        ({"gaussian": {"sxy": 3}}, ValueError, "gaussian must be a dict with sxy and compat"),
        (
            {"bilateral": {"sxy": 3, "compat": 1}},
            ValueError,
            "with sxy, srgb and compat, got the keys",
        ),
        ({"gaussian": {"sxy": 0, "compat": 1}}, ValueError, "gaussian['sxy'] must be positive"),
        ({"gaussian": {"sxy": 3, "compat": None}}, TypeError, "gaussian['compat'] must hold real"),
        ({"gaussian": {"sxy": 3, "compat": [[1, 2]]}}, ValueError, "have shape (L,) or (L, L)"),
        ({"gaussian": {"sxy": 3, "compat": []}}, ValueError, "have shape (L,) or (L, L)"),
        ({"gaussian": {"sxy": 3, "compat": torch.nan}}, ValueError, "['compat'] must be finite"),
        (
            {"features": {"sigma": 3, "compat": 1}},
            TypeError,
            "features must be a sequence of dicts",
        ),
        ({"features": [3]}, TypeError, "features[0] must be a dict with sigma and compat, got int"),
        ({"features": [{"sigma": [], "compat": 1}]}, ValueError, "features[0]['sigma'] must be a"),
        ({"iterations": -1}, ValueError, "iterations must be in [0, 2147483647], got -1"),
        ({"iterations": 2.0}, TypeError, "iterations must be an integer, got float"),
        ({"normalization": "SYM"}, ValueError, "normalization must be one of 'symmetric',"),
        ({"self_term": None}, TypeError, "self_term must be a bool, got None"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'lattice', 'exact', got 'cuda'"),
    ],
)
def test_bad_constructors(arguments, kind, text):
    with pytest.raises(kind, match=r"^DenseCRF: .*" + re.escape(text)):
        DenseCRF(**arguments)


def test_bad_calls():
    with pytest.raises(ValueError, match="image must be given for a bilateral kernel, got None"):
        DenseCRF()(LOGITS)
    with pytest.raises(ValueError, match="features must hold 0 tensors, one per kernel"):
        DenseCRF()(LOGITS, IMAGE, [LOGITS])
    crf = DenseCRF(features=[{"sigma": (1, 2), "compat": 1}])
    with pytest.raises(ValueError, match="features must hold 1 tensors, one per kernel"):
        crf(LOGITS, IMAGE)
    with pytest.raises(
        TypeError, match="DenseCRF: features must be a sequence of tensors, got a torch"
    ):
        crf(LOGITS, IMAGE, LOGITS)
    with pytest.raises(ValueError, match=r"features\[0\] must be a number or 4 numbers, got \(1"):
        crf(LOGITS, IMAGE, [LOGITS])
    with pytest.raises(TypeError, match="DenseCRF: logits must be a tensor, got ndarray"):
        DenseCRF()(LOGITS.numpy(), IMAGE)
    with pytest.raises(ValueError, match=r"have shape \(4,\) or \(4, 4\) for 4 labels"):
        DenseCRF(gaussian={"sxy": 3, "compat": [1, 2]})(LOGITS, IMAGE)


def test_found_without_importing_submodules():
    assert pydense.nn.DenseCRF is DenseCRF and pydense.ops.dense_crf is dense_crf
    assert {"nn", "ops", "reference", "densecrf"} <= set(dir(pydense))


def test_readme_example(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = text.partition("### Dense CRF on torch tensors")[2].partition("```python\n")[2]
    names = {"logits": LOGITS, "image": IMAGE}
    exec(block.partition("```")[0], names)
    assert names["probabilities"].shape == LOGITS.shape
    assert torch.equal(names["labels"], DenseCRF().labels(LOGITS, IMAGE))
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_docstring_examples():
    import doctest
    import sys

    torch.manual_seed(0)
    names = ["nn.dense_crf", "ops.dense_crf", "ops._crf_energy", "ops.permutohedral"]
    for name in names:
        result = doctest.testmod(sys.modules[f"pydense.{name}"])
        assert result.attempted > 2 and result.failed == 0, name
