# SPDX-License-Identifier: Apache-2.0
"""SegNet: say4n's, whose decoder has transposed convolutions of stride 1; the authors' Caffe."""

from ._rules import Extra, Family, Format, Rule

_STAGES = (2, 2, 3, 3, 3)


def _decoder() -> tuple[Rule, ...]:
    """The decoder's stages are numbered as the encoder's, and run backwards."""
    rules = []
    for i, convolutions in enumerate(reversed(_STAGES)):
        for j in range(convolutions):
            ours = f"decoder.{i}.{j}"
            theirs = f"decoder_convtr_{4 - i}{convolutions - 1 - j}"
            rules.append(Rule(f"{ours}.0.weight", f"{theirs}.0.weight", "flipped"))
            rules.append(Rule(f"{ours}.{{p}}", f"{theirs}.{{p}}"))
    rules.append(Rule("classifier.weight", "decoder_convtr_00.0.weight", "flipped"))
    rules.append(Rule("classifier.{p}", "decoder_convtr_00.0.{p}"))
    return tuple(rules)


def _caffe(conv: str, ours: str) -> tuple[Rule, ...]:
    """A convolution and its BN layer, whose statistics are folded into scale and shift."""
    return (
        Rule(f"{ours}.0.weight", f"{conv}.0"),
        Rule(f"{ours}.0.bias", f"{conv}.1"),
        Rule(f"{ours}.1.weight", f"{conv}_bn.0", "folded weight"),
        Rule(f"{ours}.1.bias", f"{conv}_bn.1", "folded bias"),
        Rule(f"{ours}.1.running_mean", f"{conv}_bn.1", "folded mean"),
        Rule(f"{ours}.1.running_var", f"{conv}_bn.0", "folded var"),
    )


def _caffe_classifier(conv: str) -> tuple[Rule, ...]:
    return (Rule("classifier.weight", f"{conv}.0"), Rule("classifier.bias", f"{conv}.1"))


# conv1_1 to conv5_3, and back from conv5_3_D; conv1_1_D gives the scores.
_CAFFE = (
    *(
        rule
        for i, convolutions in enumerate(_STAGES)
        for j in range(convolutions)
        for conv in (f"conv{i + 1}_{j + 1}",)
        for rule in (
            *_caffe(conv, f"encoder.{i}.{j}"),
            *_caffe(f"{conv}_D", f"decoder.{4 - i}.{convolutions - 1 - j}") * (conv != "conv1_1"),
        )
    ),
    *_caffe_classifier("conv1_1_D"),
)
# conv1 to conv4, conv_decode4 to conv_decode1, conv_classifier.
_CAFFE_BASIC = (
    *(
        rule
        for i in range(4)
        for rule in (
            *_caffe(f"conv{i + 1}", f"encoder.{i}.0"),
            *_caffe(f"conv_decode{i + 1}", f"decoder.{3 - i}.0"),
        )
    ),
    *_caffe_classifier("conv_classifier"),
)
_TUTORIAL = (
    "alexgkendall/SegNet-Tutorial: Models/*_inference.prototxt, weights of compute_bn_statistics.py"
)


def _published(name: str, variant: str, rules: tuple[Rule, ...]) -> Format:
    """Inference weights: those of a training have the same keys, but no statistics anywhere."""
    return Format(
        name,
        rules,
        preprocessing="bgr255",
        source=_TUTORIAL,
        suffix=".caffemodel",
        counters=False,
        of=("variant", variant),
    )


FAMILIES = (
    Family(
        ("SegNet",),
        ("classifier.{p}",),
        (
            Format(
                "say4n",
                (Rule("encoder.{i}.{j}.{p}", "encoder_conv_{i}{j}.{p}"), *_decoder()),
                (Extra("vgg16.{p}", "unused", "the classifier that the encoder began from"),),
                preprocessing="unit",
                source="say4n/pytorch-segnet: src/dataset.py, which scales pictures to 224x224",
                options=(("ceil_mode", False),),
                of=("variant", "vgg16"),
            ),
            _published("caffe", "vgg16", _CAFFE),
            _published("caffe-basic", "basic", _CAFFE_BASIC),
        ),
    ),
)
