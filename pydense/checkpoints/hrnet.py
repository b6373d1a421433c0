# SPDX-License-Identifier: Apache-2.0
"""HRNet: the authors' releases, whose keys the models have, for ImageNet as timm's."""

from ._rules import SAME, Extra, Family, Format, Rule

_LOSS = Extra("loss.{p}", "unused", "weights of the training loss")
_IMAGENET = tuple(
    Extra(f"{name}.{{p}}", "unused", "the classification head")
    for name in ("incre_modules", "downsamp_modules", "final_layer", "classifier")
)
# The releases were saved from a module that holds the loss too: keys begin with "model.".
_RELEASE = Format("hrnet", extras=(_LOSS,), prefix="model.", preprocessing="imagenet")

FAMILIES = (
    Family(("HRNetClassifier",), ("classifier.{p}",), (Format("hrnet", preprocessing="imagenet"),)),
    Family(
        ("HRNet",),
        ("last_layer.3.{p}",),
        (
            _RELEASE,
            Format(
                "hrnet-imagenet",
                extras=_IMAGENET,
                preprocessing="imagenet",
                optional=("last_layer.{p}",),
                auto=False,
            ),
        ),
    ),
    Family(
        ("HRNetOCR",),
        ("cls_head.{p}", "aux_head.3.{p}"),
        (
            _RELEASE,
            Format(
                # A plain HRNet begins an OCR's training: its head becomes the auxiliary one.
                "hrnet-plain",
                (Rule("aux_head.{p}", "last_layer.{p}"), SAME),
                (_LOSS,),
                preprocessing="imagenet",
                optional=("conv3x3_ocr.{p}", "ocr_distri_head.{p}", "cls_head.{p}"),
                auto=False,
            ),
            Format(
                "hrnet-imagenet",
                extras=_IMAGENET,
                preprocessing="imagenet",
                optional=("conv3x3_ocr.{p}", "ocr_distri_head.{p}", "cls_head.{p}", "aux_head.{p}"),
                auto=False,
            ),
        ),
    ),
)
