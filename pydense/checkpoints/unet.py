# SPDX-License-Identifier: Apache-2.0
"""U-Net: milesial's, whose keys the model has."""

from ._rules import Extra, Family, Format

FAMILIES = (
    Family(
        ("UNet",),
        ("outc.{p}",),
        (
            Format(
                "milesial",
                extras=(Extra("mask_values", "unused", "values of the label pictures"),),
                preprocessing="unit",
            ),
        ),
    ),
)
