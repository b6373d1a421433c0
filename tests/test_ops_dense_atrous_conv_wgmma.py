# SPDX-License-Identifier: Apache-2.0
"""The twin of the dense atrous kernel for compute capability 9.0, which only a switch chooses.

The shim has no copies of boxes, so these tests need such a GPU; the twin's tiles and steps are
proven on the CPU by ``tests/cpp/test_dense_boxes.cpp``.
"""

from __future__ import annotations

import pytest
import torch
from _ops import random, same_bits
from test_ops_dense_atrous_conv import FORMATS, OPS, check, dense, gradients, problem
from test_ops_dense_atrous_conv_cuda import CASES, FLOORS

DTYPES = [torch.bfloat16, torch.float16]
SWITCH = "PYDENSE_EXPERIMENTAL_KERNELS"


def no_such_card() -> str:
    """Why the twin cannot run here, empty where it can."""
    if not torch.cuda.is_available():
        return "no GPU on this machine"
    return "" if torch.cuda.get_device_capability() == (9, 0) else "no GPU of sm_90 here"


pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(bool(no_such_card()), reason=no_such_card() or "it can run"),
]


@pytest.fixture(autouse=True)
def switched(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")


def pyramid(dtype, form, channels=512, outputs=64):
    """DeepLab v3's branches: a map, their weights, scales and biases, and rates."""
    rates = (1, 6, 12, 18)
    x = random(2, channels, 33, 33).to("cuda", dtype).contiguous(memory_format=form)
    weights = [
        (random(outputs, channels, *[1 if rate == 1 else 3] * 2, seed=rate) / channels**0.5)
        .to("cuda", dtype)
        .contiguous(memory_format=form)
        for rate in rates
    ]
    scales = [1 + 0.1 * random(outputs, seed=rate, device="cuda") for rate in rates]
    biases = [random(outputs, seed=rate + 1, device="cuda") for rate in rates]
    return x, weights, scales, biases, rates


def branches(x, weights, scales, biases, rates):
    outputs = sum(len(weight) for weight in weights)
    shape = (x.shape[0], outputs, *x.shape[2:])
    out = torch.full(shape, 7.0, dtype=x.dtype, device="cuda")
    OPS._dense_atrous_conv2d_branches_into(x, weights, [], scales, biases, out, list(rates), True)
    return out


@pytest.mark.small
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_values_and_gradients(case, dtype, form):
    check(*CASES[case], dtype, form, device="cuda", floor=FLOORS[dtype])


def test_that_it_is_the_twin_that_runs(monkeypatch):
    from torch.profiler import ProfilerActivity, profile

    arguments = pyramid(torch.bfloat16, FORMATS[1])
    for value, name in (("1", "dense_wgmma_kernel"), ("0", "dense_mma_kernel")):
        monkeypatch.setenv(SWITCH, value)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            branches(*arguments)
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events()]
        assert any(name in found for found in names), names


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_branches_are_those_of_the_other_kernel(monkeypatch, dtype, form):
    arguments = pyramid(dtype, form)
    own = branches(*arguments)
    monkeypatch.setenv(SWITCH, "0")
    other = branches(*arguments)
    assert (own.double() - other.double()).abs().max() <= FLOORS[dtype] * other.abs().max()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_from_run_to_run(dtype, form):
    arguments = pyramid(dtype, form)
    first = branches(*arguments)
    assert all(same_bits(first, branches(*arguments)) for _ in range(10))
    x, weight, bias = problem((1, 200, 33, 33), 72, (3, 3), dtype, form, device="cuda")
    grad = random(1, 72, 33, 33, seed=5).to("cuda", dtype)
    geometry = ((12, 12), (12, 12, 12, 12))
    rows = [gradients(dense, (x, weight, bias), geometry, grad)[:2] for _ in range(5)]
    assert all(same_bits(a, b) for row in rows[1:] for a, b in zip(rows[0], row, strict=True))


def test_whole_numbers():
    """Sums of few whole numbers are exact in every type."""
    for dtype in DTYPES:
        x = random(1, 192, 17, 18, device="cuda").sign() * (random(1, 192, 17, 18).cuda() > 1)
        weight = random(136, 192, 3, 3, seed=1, device="cuda").sign()
        expected = dense(x.double().cpu(), weight.double().cpu(), None, (4, 4), (4, 4, 4, 4))
        assert expected.abs().max() <= 256  # what bfloat16 holds
        for form in FORMATS:
            own = dense(
                *(t.to(dtype).contiguous(memory_format=form) for t in (x, weight)),
                None,
                (4, 4),
                (4, 4, 4, 4),
            )
            assert torch.equal(own.double().cpu(), expected)


def test_padding_is_not_multiplied():
    """Infinite weights meet the map alone."""
    for dtype in DTYPES:
        x, weight, bias = problem((1, 72, 4, 5), 40, (3, 3), dtype, device="cuda")
        weight[:, :, 0] = float("inf")
        weight[:, :, 1, 0] = float("nan")
        out = dense(x, weight, bias, (5, 5), (5, 5, 5, 5))
        centre = dense(x, weight[:, :, 1:2, 1:2], bias, (1, 1), (0, 0, 0, 0))
        assert torch.equal(out, centre) and bool(out.isfinite().all())
