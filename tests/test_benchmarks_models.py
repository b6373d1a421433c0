# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole models: its rivals agree, and a quick run writes a result."""

from __future__ import annotations

import gc

import pytest
import torch
from _benchmarks import _result
from _ops import one_thread as one_thread
from torch.nn.functional import conv_transpose2d

from benchmarks import _model_cases, bench_models
from benchmarks._harness import stages_of, time_call
from benchmarks._model_operators import torch_operators
from pydense import ops

QUICK = {problem.name: problem for problem in _model_cases.quick_problems()}


@pytest.mark.parametrize("name", list(QUICK))
def test_rivals_compute_the_same(name):
    case = bench_models.make_case(name)
    rivals = {k: v for k, v in case.setup().items() if k not in _model_cases.COMPILED}
    results = {label: time_call(stages_of(rival))[1] for label, rival in rivals.items()}
    figures = [next(iter(row.values())) for row in case.check(results).values()]
    bound = 0.02 if name.endswith("bf16") else 1e-3
    assert len(figures) == 3 and max(figures) <= bound
    results["torch NCHW"] = results["torch NCHW"] + 1
    assert max(case.check(results)["torch NCHW"].values()) > 0.05


def test_models_live_as_long_as_their_case_runs():
    case = bench_models.make_case("model-inference/unet_bilinear/33x33/f32")
    rivals = case.setup()
    case.prime("pydense")
    del rivals
    gc.collect()
    with pytest.raises(AssertionError):
        case.prime("pydense")


def test_cases():
    found = {problem.name for problem in _model_cases.problems()}
    assert len(found) == len(_model_cases.problems()) == 2 * (16 + 12 + 14)
    assert all(problem.size <= 321 for problem in _model_cases.problems())
    assert "head-training/deeplab_v3_resnet50/321x321/bf16" in found
    case = bench_models.make_case("model-inference/fcn8s_vgg16/225x225/f32")
    assert bench_models.BENCHMARK.missing(case) == ""


def test_operators_of_the_rivals():
    """They are those of pydense, as users write them in torch."""
    own = torch_operators()
    x = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    crop = dict(stride=4, kernel_size=8, offset=3, size=(19, 22))
    whole = conv_transpose2d(x, ops.bilinear_filler(3, 8, dtype=torch.float64), stride=4)
    for function in (own.upsample_crop, ops.upsample_crop):
        assert torch.allclose(function(x, **crop), whole[:, :, 3:22, 3:25])
    same = dict(stride=1, kernel_size=1, size=(8, 5))
    assert torch.equal(own.upsample_crop(x, **same), ops.upsample_crop(x, **same))
    maps = [x, torch.randn(1, 3, 3, 4, dtype=torch.float64)]
    for options in ({}, {"relu": True, "align_corners": True}, {"mode": "nearest"}):
        assert torch.allclose(
            own.fuse_sum_upsample(maps, **options), ops.fuse_sum_upsample(maps, **options)
        )
    target = torch.randint(3, (1, 20, 21))
    assert torch.allclose(
        own.upsample_cross_entropy(x, target, ignore_index=255),
        ops.upsample_cross_entropy(x, target, ignore_index=255),
    )


def test_quick_run_writes_a_valid_result(tmp_path, monkeypatch):
    eager = {k: v for k, v in _model_cases.RIVALS.items() if k not in _model_cases.COMPILED}
    monkeypatch.setattr(_model_cases, "RIVALS", eager)
    few = _model_cases.quick_problems()[:3]
    monkeypatch.setattr(bench_models, "quick_problems", lambda: few)
    path = tmp_path / "result.json"
    bench_models.BENCHMARK.main(["--quick", "--no-memory", "--threads", "1", "--output", str(path)])
    result = _result.load_result(path)
    assert {run["case"] for run in result["runs"]} == {problem.name for problem in few}
