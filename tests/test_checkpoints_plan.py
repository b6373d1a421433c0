# SPDX-License-Identifier: Apache-2.0
"""The matching of keys under random damage: every key is accounted for, once."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from _networks import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pydense import checkpoints, models
from pydense.checkpoints import CheckpointError

BUILDS = {
    "milesial": partial(models.UNet, 3, width=2),
    "caffe-basic": partial(models.SegNet, 3, "basic"),
    "say4n": partial(models.SegNet, 3),
    "ademxapp": partial(models.FCRN, 3, width=0.05, head_channels=8),
    "kazuto1011": partial(models.DeepLabV2ResNet, 3, 50, msc=True),
    "caffe": partial(models.DeepLabV2ResNet, 3, 50, msc=False),
    "hrnet": partial(models.hrnet_w18_small_v1, 3),
}


@cache
def published(format: str) -> tuple[Any, dict[str, Tensor], dict[str, set[str]]]:
    """A model, its weights under the format's keys, and which of these each of its keys takes."""
    model = fill(BUILDS[format]())
    state = checkpoints.convert(model, to_format=format)
    prefix = checkpoints.plan(model, state)[0].prefix
    from pydense.checkpoints import _match, _rules, _transforms

    chosen = _match.named(model, format)
    takes = {}
    for key, value in model.state_dict().items():
        row = _rules.find(chosen, key, value.shape[0] if value.dim() else 0)
        if row:
            names = _transforms.used(row[0].how, row[1][0])
            takes[key] = {prefix + name for name in names if prefix + name in state}
    assert set().union(*takes.values()) == set(state)
    return model, state, takes


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["drop", "rename", "grow", "swap", "text", "add", "half"]),
        st.integers(0, 10_000),
        st.integers(0, 10_000),
    ),
    max_size=6,
)


def damaged(state: dict[str, Tensor], steps: list[tuple[str, int, int]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(state)
    for what, a, b in steps:
        keys = [*found]
        key, other = keys[a % len(keys)], keys[b % len(keys)]
        value = found[key]
        if what == "drop":
            del found[key]
        elif what == "rename":
            cut = b % (len(key) + 1)
            new = key[:cut] + "x" + key[cut:]
            if new not in found:
                found[new] = found.pop(key)
        elif what == "grow" and isinstance(value, Tensor):
            found[key] = torch.zeros(*value.shape, 2)
        elif what == "swap":
            found[key], found[other] = found[other], found[key]
        elif what == "text":
            found[key] = "hello"
        elif what == "add":
            found[f"{key}.{b}"] = torch.zeros(b % 3)
        elif what == "half" and isinstance(value, Tensor):
            found[key] = value.half()
    return found


@pytest.mark.parametrize("format", BUILDS)
@settings(max_examples=40)
@given(steps=DAMAGE, reinit=st.booleans())
def test_no_key_is_skipped(format, steps, reinit):
    model, state, takes = published(format)
    given_ = damaged(state, steps)
    try:
        report, values = checkpoints.plan(model, given_, format=format, reinit_classifier=reinit)
    except CheckpointError as error:  # a text where a number must be, or nothing left
        assert len(str(error)) < 3000
        return
    own = model.state_dict()
    # Each key of the model is in one list.
    rows = [
        *report.loaded,
        *report.missing,
        *(key for key, _, _ in report.mis_shaped),
        *report.kept,
        *report.reinitialized,
    ]
    divisors = {key for key in report.missing if key not in own}
    assert sorted(set(rows) - divisors) == sorted(own) and len(rows) == len(own) + len(divisors)
    assert not divisors & set(given_)
    assert sorted(values) == sorted(report.loaded)
    assert all(values[key].shape == own[key].shape for key in values)
    # Each key of the file fills something, or is named.
    named = {*report.unexpected, *(key for key, _ in report.dropped)}
    taken = [key for key in (*report.loaded, *(row[0] for row in report.mis_shaped))]
    used = set().union(*(takes[key] for key in taken if key in takes))
    excused = set().union(*(takes[key] for key in report.reinitialized if key in takes))
    assert set(given_) <= named | used | excused
    assert not named & used
    # What is complete has the numbers that the file says.
    if report.complete and not reinit and not {"swap", "grow", "half"} & {row[0] for row in steps}:
        exact = [key for key in report.loaded if "running" not in key or format != "caffe-basic"]
        for key in exact:
            if format != "caffe-basic" or ".1." not in key:
                assert torch.equal(values[key], own[key]), key
    if report.complete and not reinit:
        assert all(key.endswith("num_batches_tracked") for key in report.kept)
        assert all(key.endswith("num_batches_tracked") for key in state if key not in given_)


@pytest.mark.parametrize("format", BUILDS)
@settings(max_examples=15)
@given(data=st.data())
def test_one_change_is_one_complaint(format, data):
    model, state, takes = published(format)
    key = data.draw(st.sampled_from(sorted(state)))
    users = [ours for ours, theirs in takes.items() if key in theirs]
    what = data.draw(st.sampled_from(["drop", "rename", "grow"]))
    changed = damaged(state, [(what, [*state].index(key), 10**6)])
    if what == "rename" and key in changed:
        return
    if key.endswith("num_batches_tracked") and what != "grow":
        report = checkpoints.plan(model, changed, format=format)[0]
        assert report.missing == [] and set(users) <= set(report.kept)
        assert (what == "rename") == (not report.complete)
        return
    if key.startswith("bn") and what == "grow" and format == "caffe" and key.endswith(".2"):
        with pytest.raises(CheckpointError, match="must be one real number"):
            checkpoints.plan(model, changed, format=format)
        return
    report = checkpoints.plan(model, changed, format=format)[0]
    assert not report.complete
    if key.startswith("bn") and key.endswith(".2"):  # the divisor of Caffe's statistics
        assert report.missing == [key] and not report.mis_shaped
    elif what == "grow":
        assert [row[0] for row in report.mis_shaped] == users and not report.missing
    else:
        assert report.missing == users and not report.mis_shaped
    new = [name for name in changed if name not in state]
    assert report.unexpected == new
