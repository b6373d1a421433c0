# SPDX-License-Identifier: Apache-2.0
"""DeepLab v3 and FCN on ResNet: torchvision's, whose keys the models have."""

from ._rules import Extra, Family, Format, Rule

FAMILIES = (
    Family(
        ("DeepLabV3", "FCNResNet"),
        ("classifier.4.{p}", "aux_classifier.4.{p}"),
        (
            Format("torchvision", preprocessing="imagenet"),
            Format(
                "torchvision-backbone",
                (Rule("backbone.{p}", "{p}"),),
                (Extra("fc.{p}", "unused", "scores of ImageNet's classes"),),
                preprocessing="imagenet",
                optional=("classifier.{p}", "aux_classifier.{p}"),
                auto=False,
            ),
        ),
    ),
)
