# SPDX-License-Identifier: Apache-2.0
"""crop_offset: the numbers in FCN's prototxts, from the layers; what it refuses; real networks."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pydense.nn import UpsampleCrop
from pydense.ops import coordinate_map, crop_offset, upsample_crop
from pydense.ops.coord_map import AxisCoordinates, Conv, Crop, Deconv, Pointwise, Pool


def vgg(first_padding=100):
    """VGG-16's five stages and FCN's classifier; stages[k] ends at pool k + 1."""
    stages = [
        [layer for _ in range(n) for layer in (Conv(3, padding=1), Pointwise())]
        + [Pool(2, stride=2)]
        for n in (2, 2, 3, 3, 3)
    ]
    stages[0][0] = Conv(3, padding=first_padding)
    return stages, [Conv(7), Pointwise(), Conv(1), Pointwise(), Conv(1)]


ALEXNET = [
    Conv(11, stride=4, padding=100),
    Pool(3, stride=2),
    Conv(5, padding=2),
    Pool(3, stride=2),
    Conv(3, padding=1),
    Conv(3, padding=1),
    Conv(3, padding=1),
    Pool(3, stride=2),
    Conv(6),
    Conv(1),
    Conv(1),
]


class TestFcn:
    """Facts: voc-fcn32s, -fcn16s, -fcn8s, -fcn-alexnet of fcn.berkeleyvision.org."""

    def test_fcn32s(self):
        stages, classifier = vgg()
        low = [*stages, *classifier]
        scale = Fraction(1, 32)
        assert coordinate_map(low) == (AxisCoordinates(scale, Fraction(-25, 64)),) * 2
        assert crop_offset([*low, Deconv(64, 32)]) == 19

    def test_fcn16s(self):
        stages, classifier = vgg()
        up = [*stages, *classifier, Deconv(4, 2)]
        pool4 = [*stages[:4], Conv(1)]
        assert crop_offset(pool4, up) == 5
        # The sum lies on the grid of what was cropped, and of what it was cropped to.
        fused = [*pool4, Crop(5)]
        assert coordinate_map(fused) == coordinate_map(up)
        assert coordinate_map(fused)[0] == AxisCoordinates(Fraction(1, 16), Fraction(23, 32))
        assert crop_offset([*fused, Deconv(32, 16)]) == crop_offset([*up, Deconv(32, 16)]) == 27

    def test_fcn8s(self):
        stages, _ = vgg()
        fused4 = [*stages[:4], Conv(1), Crop(5)]
        pool3 = [*stages[:3], Conv(1)]
        assert crop_offset(pool3, [*fused4, Deconv(4, 2)]) == 9
        fused3 = [*pool3, Crop(9)]
        assert coordinate_map(fused3)[0] == AxisCoordinates(Fraction(1, 8), Fraction(47, 16))
        assert crop_offset([*fused3, Deconv(16, 8)]) == 31

    def test_alexnet(self):
        assert coordinate_map(ALEXNET)[0] == AxisCoordinates(Fraction(1, 32), Fraction(-13, 32))
        assert crop_offset([*ALEXNET, Deconv(63, 32)]) == 18

    def test_from_torch_layers(self):
        """The same network as modules, in the shape of wkentaro's."""
        layers: list[nn.Module] = []
        channels, padding = 1, 100
        for n in (2, 2, 3, 3, 3):
            for _ in range(n):
                layers += [nn.Conv2d(channels, 1, 3, padding=padding), nn.ReLU(inplace=True)]
                channels, padding = 1, 1
            layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
        layers += [nn.Conv2d(1, 1, 7), nn.ReLU(), nn.Dropout2d(), nn.Conv2d(1, 1, 1)]
        deconv = nn.ConvTranspose2d(1, 1, 64, stride=32, bias=False)
        assert crop_offset([nn.Sequential(*layers), deconv]) == 19
        upscore = UpsampleCrop(32, 64, offset=19)
        assert coordinate_map([*layers, upscore]) == coordinate_map(())

    @pytest.mark.parametrize("size", [(1, 1), (40, 33), (97, 128)])
    def test_the_crop_is_inside(self, size):
        """The network's own sizes: the deconvolution's output holds the crop."""
        h, w = size
        pools = [nn.MaxPool2d(2, 2, ceil_mode=True)] * 5
        convs = nn.Conv2d(1, 1, 3, padding=100), nn.Conv2d(1, 1, 7)
        with torch.no_grad():
            low = nn.Sequential(convs[0], *pools, convs[1])(torch.zeros(1, 1, h, w))
        full = [32 * (n - 1) + 64 for n in low.shape[2:]]
        assert all(19 + n <= f for n, f in zip((h, w), full, strict=True))
        assert upsample_crop(low, stride=32, kernel_size=64, offset=19, size=size).shape[2:] == size


class TestRules:
    def test_middle_of_the_receptive_field(self):
        """A spike is seen strongest where the map says: odd windows have a middle pixel."""
        layers = nn.Sequential(
            nn.Conv2d(1, 1, 3, stride=2, padding=1, dilation=1, bias=False),
            nn.Conv2d(1, 1, 3, padding=2, dilation=2, bias=False),
        )
        weight = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).view(1, 1, 3, 3)
        for layer in layers:
            layer.weight.data.copy_(weight)
        at, _ = coordinate_map(layers)
        image = torch.zeros(1, 1, 41, 41)
        image[..., 20, 24] = 1
        with torch.no_grad():
            out = layers(image)[0, 0]
        row, column = divmod(int(out.argmax()), out.shape[1])
        assert row == at.scale * 20 + at.shift and column == at.scale * 24 + at.shift

    def test_resnet_has_no_integer_offset(self):
        """Symmetric paddings map x to x / 32: no crop of a k = 64 deconvolution aligns."""
        resnet = [Conv(7, 2, 3), Pool(3, 2, 1), *[Conv(3, 2, 1)] * 3]
        assert coordinate_map(resnet)[0] == AxisCoordinates(Fraction(1, 32), Fraction(0))
        assert crop_offset([*resnet, Deconv(63, 32)]) == 31
        with pytest.raises(ValueError, match="must be an integer, got 63/2 along y"):
            crop_offset([*resnet, Deconv(64, 32)])
        assert crop_offset([*resnet, Deconv(64, 32)], real=True) == Fraction(63, 2)

    def test_axes_that_differ(self):
        layers = [Conv((3, 5), (2, 4), (1, 0)), Deconv((4, 8), (2, 4), (0, 1))]
        y, x = coordinate_map(layers)
        assert (y.scale, x.scale) == (1, 1)
        assert crop_offset(layers, real=True) == (Fraction(3, 2), Fraction(1, 2))
        both = crop_offset([Deconv((3, 5), 1)])
        assert both == (1, 2) and all(type(n) is int for n in both)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"same scale .* got 1/2 and 1 along y \(scale mism"):
            crop_offset([Conv(2, stride=2)])
        with pytest.raises(ValueError, match="must not be negative, got -1 along y: the map does"):
            crop_offset([Conv(3)])
        assert crop_offset([Conv(3)], real=True) == -1
        with pytest.raises(TypeError, match=r"layer 1 must be Conv, .* got AdaptiveAvgPool2d"):
            crop_offset([Conv(3), nn.AdaptiveAvgPool2d(1)])
        with pytest.raises(TypeError, match=r"layer 0 must be Conv, Pool, .* got int"):
            coordinate_map([3])
        with pytest.raises(ValueError, match="stride of layer 0 must be in"):
            coordinate_map([Conv(3, stride=0)])
        with pytest.raises(ValueError, match="must upsample by a factor"):
            coordinate_map([nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)])
        # The formula then uses in / out, unless the factor is whole.
        again = {"mode": "bilinear", "recompute_scale_factor": True}
        with pytest.raises(ValueError, match="must have a whole scale_factor with recompute"):
            coordinate_map([nn.Upsample(scale_factor=1.5, **again)])
        assert coordinate_map([nn.Upsample(scale_factor=2.0, **again)])[0].scale == 2
        with pytest.raises(TypeError, match="real must be a bool"):
            crop_offset([], real=1)
        with pytest.raises(ValueError, match="offset of layer 0 must be a number or"):
            coordinate_map([Crop((1, 2, 3))])

    def test_same_padding_and_upsample(self):
        for k, d in ((3, 1), (3, 2), (5, 3), (4, 1)):
            same = coordinate_map([nn.Conv2d(1, 1, k, padding="same", dilation=d)])[0]
            assert same == AxisCoordinates(Fraction(1), Fraction(0 if k % 2 else -1, 2))
        assert coordinate_map([nn.Conv2d(1, 1, 3, padding="valid")])[0].shift == -1
        up = nn.Upsample(scale_factor=4, mode="bilinear")
        assert coordinate_map([up])[0] == AxisCoordinates(Fraction(4), Fraction(3, 2))
        # A half-pixel upsampling by 4 is the deconvolution with k = 8, p = 2.
        assert coordinate_map([up]) == coordinate_map([Deconv(8, 4, 2)])

    @settings(max_examples=50)
    @given(
        layers=st.lists(
            st.builds(
                Conv,
                st.integers(1, 7),
                st.integers(1, 4),
                st.integers(0, 9),
                st.integers(1, 3),
            ),
            max_size=5,
        ),
        o=st.fractions(0, 50, max_denominator=8),
    )
    def test_undoing_layers(self, layers, o):
        """A transposed convolution undoes the convolution of the same numbers."""
        undone = [Deconv(n.kernel_size, n.stride, n.padding, n.dilation) for n in layers[::-1]]
        assert crop_offset([*layers, *undone]) == 0
        assert crop_offset([*layers, *undone, Crop(-o)], real=True) == o
