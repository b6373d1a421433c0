# SPDX-License-Identifier: Apache-2.0
"""SegNet: say4n's, whose decoder has transposed convolutions of stride 1."""

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


FAMILIES = (
    Family(
        ("SegNet",),
        ("classifier.{p}",),
        (
            Format(
                "say4n",
                (Rule("encoder.{i}.{j}.{p}", "encoder_conv_{i}{j}.{p}"), *_decoder()),
                (Extra("vgg16.{p}", "unused", "the classifier that the encoder began from"),),
                preprocessing=None,  # the code feeds what the data set gives
                options=(("ceil_mode", False),),
            ),
        ),
    ),
)
