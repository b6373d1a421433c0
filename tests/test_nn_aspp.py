# SPDX-License-Identifier: Apache-2.0
"""DeepLab v2's classifier: parameter names, initial values, equality with the published form."""

from __future__ import annotations

import pickle

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random
from torch import nn

from pydense.nn import ASPPSum


class Published(nn.Module):
    """As the PyTorch ports of DeepLab v2 write it."""

    def __init__(self, rates):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(8, 3, 3, stride=1, padding=r, dilation=r) for r in rates
        )

    def forward(self, x):
        return sum(conv(x) for conv in self.conv2d_list)


class TestASPPSum:
    def test_loads_published_names(self):
        rates = (6, 12, 18, 24)
        theirs, own = Published(rates), ASPPSum(8, 3, rates)
        own.load_state_dict(theirs.state_dict())
        x = random(2, 8, 33, 29)
        assert torch.allclose(own(x), theirs(x), atol=1e-5)
        theirs.load_state_dict(own.state_dict())
        assert [*own.state_dict()] == [*theirs.state_dict()]
        renamed = {
            f"base.aspp.{key.replace('conv2d_list.', 'c')}": value
            for key, value in theirs.state_dict().items()
        }
        model = nn.ModuleDict({"base": nn.ModuleDict({"aspp": ASPPSum(8, 3, rates)})})
        model.load_state_dict(renamed)
        assert torch.equal(model["base"]["aspp"](x), own(x))
        assert "base.aspp.c0.weight" in renamed  # the caller's own is not changed

    def test_missing_and_unexpected_keys(self):
        head = ASPPSum(8, 3, (1, 2))
        state = head.state_dict()
        del state["conv2d_list.1.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key.*conv2d_list.1.bias"):
            head.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*c2.weight"):
            ASPPSum(8, 3, (1, 2)).load_state_dict(
                {**ASPPSum(8, 3, (1, 2)).state_dict(), "c2.weight": torch.zeros(3, 8, 3, 3)}
            )

    def test_initial_values(self):
        head = ASPPSum(64, 21)
        for layer in head.conv2d_list:
            assert 0.009 < float(layer.weight.std()) < 0.011 and not layer.bias.any()
        assert sum(p.numel() for p in ASPPSum(8, 3, bias=False).parameters()) == 4 * 8 * 3 * 9

    def test_trains_and_pickles(self):
        head = ASPPSum(4, 2, (1, 2))
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        x, target = random(2, 4, 6, 6), random(2, 2, 6, 6, seed=1)
        losses = []
        for _ in range(5):
            loss = (head(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
        assert torch.equal(pickle.loads(pickle.dumps(head))(x), head(x))

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"in_channels": 0}, ValueError, "in_channels must be in"),
            ({"out_channels": 1.5}, TypeError, "out_channels must be an integer"),
            ({"rates": ()}, ValueError, "rates must be 1 to 64 integers, got 0"),
            ({"rates": (0,)}, ValueError, r"rates\[0\] must be in"),
            ({"bias": 1}, TypeError, "bias must be a bool"),
        ],
    )
    def test_bad_arguments(self, change, error, text):
        with pytest.raises(error, match=f"ASPPSum: {text}"):
            ASPPSum(**{"in_channels": 2, "out_channels": 2, **change})
