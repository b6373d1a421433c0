# SPDX-License-Identifier: Apache-2.0
"""RefineNet and Light-Weight RefineNet: DrSleep's, whose keys the models have."""

from ._rules import Extra, Family, Format

_UNUSED = (Extra("fc.{p}", "unused", "scores of ImageNet's classes"),)

FAMILIES = (
    Family(
        ("RefineNet", "LightWeightRefineNet"),
        ("clf_conv.{p}",),
        (
            Format("drsleep", preprocessing="imagenet"),
            Format(
                "torchvision-backbone",
                extras=_UNUSED,
                preprocessing="imagenet",
                optional=(*("p_ims1d2_{p}", "adapt_stage{p}", "mflow_conv_{p}", "clf_conv.{p}"),),
                auto=False,
            ),
        ),
    ),
    Family(
        ("LightWeightRefineNetMobileNet",),
        ("segm.{p}",),
        (Format("drsleep", preprocessing="imagenet"),),
    ),
)
