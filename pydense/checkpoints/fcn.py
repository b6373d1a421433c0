# SPDX-License-Identifier: Apache-2.0
"""FCN: wkentaro's PyTorch port, the authors' Caffe nets, DIGITS, torchvision's VGG16."""

from ._rules import Extra, Family, Format, Rule

# Name and size of the fixed deconvolutions, all that there are.
_FILTERS = (("upscore2", 4), ("upscore_pool4", 4), ("upscore8", 16), ("upscore16", 32))
_FCN_FILTERS = (*_FILTERS, ("upscore", 64))
_CAFFE = (Rule("{p}.weight", "{p}.0"), Rule("{p}.bias", "{p}.1"))
# VGG16's convolutions in torchvision's features.N.
_VGG16 = {
    f"conv{stage + 1}_{k + 1}": at
    for stage, row in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)))
    for k, at in enumerate(row)
}


def _filters(names: tuple[tuple[str, int], ...], suffix: str) -> tuple[Extra, ...]:
    return tuple(Extra(f"{n}.{suffix}", "bilinear", module=n, size=size) for n, size in names)


# None for AlexNet: torchvision's is another net, without groups.
_TORCHVISION = Format(
    "torchvision-classifier",
    (
        *(Rule(f"{n}.{{p}}", f"features.{at}.{{p}}") for n, at in _VGG16.items()),
        Rule("fc6.{p}", "classifier.0.{p}", "flat"),
        Rule("fc7.{p}", "classifier.3.{p}", "flat"),
    ),
    (Extra("classifier.6.{p}", "unused", "scores of ImageNet's classes"),),
    preprocessing="imagenet",
    optional=("score_{p}", "upscore{p}"),
    auto=False,
)


FAMILIES = (
    Family(
        ("FCN",),
        ("score_{p}", "upscore{p}"),
        (
            Format(
                "wkentaro",
                (),
                _filters(_FCN_FILTERS, "weight"),
                preprocessing="caffe-fcn",
            ),
            Format(
                "caffe",
                _CAFFE,
                (
                    *_filters(_FCN_FILTERS, "0"),
                    Extra("scale_pool4.0", "constant", 0.01, "at_once", channels=512),
                    Extra("scale_pool3.0", "constant", 0.0001, "at_once", channels=256),
                ),
                preprocessing="caffe-fcn",
                suffix=".caffemodel",
            ),
            _TORCHVISION,
        ),
    ),
    Family(
        ("FCNCRFasRNN",),
        ("score_{p}", "upscore{p}", "crfrnn.{p}"),
        (
            Format(
                "sadeepj",
                extras=_filters(_FCN_FILTERS, "weight"),
                preprocessing="caffe-vgg",
                source="sadeepj/crfasrnn_pytorch: crfasrnn/util.py, which first scales pictures to "
                "500 on the longer side and pads them to a square",
            ),
        ),
    ),
    Family(
        ("FCNAlexNet",),
        ("score_{p}", "upscore{p}"),
        (
            Format(
                "caffe",
                _CAFFE,
                _filters((("upscore", 63),), "0"),
                preprocessing=None,
                source="the authors' net has caffe-fcn, that of DIGITS digits",
                suffix=".caffemodel",
            ),
        ),
    ),
)
