# SPDX-License-Identifier: Apache-2.0
"""pydense.nn.UpsampleCrop: in place of ConvTranspose2d and a slice, with its checkpoints."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from _ops import random, same_bits
from torch import nn

from pydense.nn import UpsampleCrop
from pydense.ops import bilinear_filler, upsample_crop


class Fcn(nn.Module):
    """The end of FCN-16s, in torch and with the layer."""

    def __init__(self, fused, groups=1):
        super().__init__()
        self.score = nn.Conv2d(3, 5, 1)
        if fused:
            self.upscore = UpsampleCrop(16, 32, offset=27)
        else:
            self.upscore = nn.ConvTranspose2d(5, 5, 32, 16, groups=groups, bias=False)
            self.upscore.weight.data.copy_(bilinear_filler(5, 32, groups=groups))
        self.fused = fused

    def forward(self, x, image):
        x = self.score(x)
        if self.fused:
            return self.upscore(x, image)
        return self.upscore(x)[:, :, 27 : 27 + image.shape[2], 27 : 27 + image.shape[3]]


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpoint_of_the_deconvolution(groups, dtype):
    torch.manual_seed(0)
    old, new = Fcn(False, groups), Fcn(True)
    checkpoint = {name: tensor.to(dtype) for name, tensor in old.state_dict().items()}
    result = new.load_state_dict(checkpoint)
    assert not result.missing_keys and not result.unexpected_keys
    assert "upscore.weight" in checkpoint  # it was not taken out of the caller's dict
    x, image = random(2, 3, 6, 7), random(2, 3, 50, 40)
    rounding = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert (new(x, image) - old(x, image)).abs().max() < rounding
    assert list(new.state_dict()) == ["score.weight", "score.bias"]
    again = Fcn(True)
    again.load_state_dict(new.state_dict())
    assert same_bits(again(x, image), new(x, image))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w * 1.01, "values that differ from it by up to 0.00"),
        (lambda w: w.roll(1, 0), "weights between different channels"),
        (lambda w: w[:, :, :30], r"got shape \(5, 5, 30, 32\)"),
        (lambda w: w[0], r"got shape \(5, 32, 32\)"),
        (lambda w: w * float("nan"), "weights between different channels"),
        (lambda w: (4 * w).long(), "dtype torch.int64"),
        (lambda w: torch.zeros_like(w), "values that differ from it by up to 0.938"),
    ],
)
def test_other_weights_are_refused(change, text):
    checkpoint = Fcn(False).state_dict()
    checkpoint["upscore.weight"] = change(checkpoint["upscore.weight"])
    pattern = "UpsampleCrop: upscore.weight must be the bilinear filter"
    with pytest.raises(RuntimeError, match=rf"{pattern} .*{text}.*keep nn.ConvTranspose2d"):
        Fcn(True).load_state_dict(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_changes_are_seen_in_any_dtype(dtype):
    """Also where a weight is small, and off the diagonal, where any number is one too many."""
    for index, value in (((0, 0, 0, 0), 0.0), ((1, 1, 0, 5), 0.006), ((1, 2, 3, 3), 1e-4)):
        checkpoint = {name: t.to(dtype) for name, t in Fcn(False).state_dict().items()}
        checkpoint["upscore.weight"][index] = value
        with pytest.raises(RuntimeError, match=r"upscore.weight must be the bilinear filter"):
            Fcn(True).load_state_dict(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 3, 15, 21, 22, 63, 64])
def test_checkpoints_that_went_through_16_bits(size, dtype):
    stride = (size + 1) // 2
    for first in (torch.float32, torch.float64):
        weight = bilinear_filler(21, size, dtype=first).to(dtype).float()
        UpsampleCrop(stride, size).load_state_dict({"weight": weight})


def test_fillers_in_float32():
    """Caffe computes the filter in float32."""
    for size in (21, 22, 63, 127):
        half = (size + 1) // 2
        middle = torch.tensor(half - (1.0 if size % 2 else 0.5))
        row = 1 - ((torch.arange(size).float() - middle) / half).abs()
        UpsampleCrop(half, size).load_state_dict({"weight": torch.outer(row, row)[None, None]})


def test_meta_weights_are_refused():
    with torch.device("meta"):
        weight, bias = torch.empty(2, 2, 4, 4), torch.empty(2)
    with pytest.raises(RuntimeError, match=r"got a meta tensor, which has no values"):
        UpsampleCrop(2, 4).load_state_dict({"weight": weight})
    with pytest.raises(RuntimeError, match=r"bias must be 0, got a meta tensor"):
        UpsampleCrop(2, 4).load_state_dict({"bias": bias})


def test_the_offset_is_the_layers_own():
    offset = [1, 2]
    layer = UpsampleCrop(2, 4, offset=offset)
    offset[0] = 5
    assert layer.offset == (1, 2)


def test_bias():
    checkpoint = {**Fcn(False).state_dict(), "upscore.bias": torch.zeros(5)}
    Fcn(True).load_state_dict(checkpoint)
    checkpoint["upscore.bias"] = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"upscore.bias must be 0, got a trained one"):
        Fcn(True).load_state_dict(checkpoint)


def test_unknown_keys_are_still_reported():
    checkpoint = {**Fcn(False).state_dict(), "upscore.scale": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*upscore.scale"):
        Fcn(True).load_state_dict(checkpoint)


def test_from_conv_transpose():
    deconv = nn.ConvTranspose2d(4, 4, (4, 7), (2, 4), (1, 0), bias=False, groups=2)
    deconv.weight.data.copy_(bilinear_filler(4, (4, 7), groups=2))
    layer = UpsampleCrop.from_conv_transpose(deconv, offset=(1, 2))
    x = random(1, 4, 5, 6)
    expected = deconv(x)[:, :, 1:9, 2:22]
    assert (layer(x, (8, 20)) - expected).abs().max() < 1e-5
    for bad, text in (
        (nn.ConvTranspose2d(4, 4, 4, 2, bias=False), "weight must be the bilinear filter"),
        (nn.ConvTranspose2d(4, 2, 4, 2), "must keep the number of channels, got 4 -> 2"),
        (nn.ConvTranspose2d(4, 4, 4, 2, dilation=2), "must have dilation 1, got"),
        (nn.ConvTranspose2d(4, 4, 4, 2, output_padding=1), "must have output_padding 0, got"),
        (nn.ConvTranspose2d(4, 4, 3, 3), "kernel_size must be 2"),
    ):
        with pytest.raises(ValueError, match=text):
            UpsampleCrop.from_conv_transpose(bad)


def test_as_a_layer():
    layer = UpsampleCrop(stride=2, kernel_size=3, padding=1, offset=Fraction(1, 2), border="clamp")
    x = random(1, 3, 5, 6)
    out = layer(x, 9)
    options = {"stride": 2, "kernel_size": 3, "padding": 1, "offset": 0.5, "border": "clamp"}
    assert same_bits(out, upsample_crop(x, size=9, **options))
    assert same_bits(copy.deepcopy(layer)(x, 9), out)
    assert same_bits(pickle.loads(pickle.dumps(layer))(x, (9, 9)), out)
    assert same_bits(layer(x, torch.empty(1, 1, 9, 9)), out)
    text = "stride=(2, 2), kernel_size=(3, 3), padding=(1, 1), offset=1/2, border='clamp'"
    assert repr(layer) == f"UpsampleCrop({text})"
    assert not list(layer.parameters()) and not layer.state_dict()
    for bad in ({"kernel_size": 5}, {"stride": 0}, {"border": "wrap"}, {"offset": float("nan")}):
        with pytest.raises(ValueError, match=r"UpsampleCrop: \w+ must"):
            UpsampleCrop(**{"stride": 2, "kernel_size": 3, **bad})
