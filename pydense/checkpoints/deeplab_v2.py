# SPDX-License-Identifier: Apache-2.0
"""DeepLab v1 and v2: kazuto1011, isht7, rulixiang, HAL-42, the authors' Caffe nets."""

from ._rules import Extra, Family, Format, Rule

_BLOCKS = {"2": 3, "3": 4, "4": 23, "5": 3}  # of ResNet-101
# Branch of a block in Caffe, and kazuto1011's name: convolution and norm.
_BRANCHES = (
    ("conv1", "bn1", "2a", "reduce"),
    ("conv2", "bn2", "2b", "conv3x3"),
    ("conv3", "bn3", "2c", "increase"),
    ("downsample.0", "downsample.1", "1", "shortcut"),
)


def _caffe_norm(ours: str, caffe: str) -> tuple[Rule, ...]:
    """Caffe's two layers, BatchNorm (mean, variance, their divisor) and Scale."""
    return (
        Rule(f"{ours}.weight", f"scale{caffe}.0"),
        Rule(f"{ours}.bias", f"scale{caffe}.1"),
        Rule(f"{ours}.running_mean", f"bn{caffe}.0", "scaled"),
        Rule(f"{ours}.running_var", f"bn{caffe}.1", "scaled"),
    )


def _letter(stage: str, block: int) -> str:
    """Names of blocks: a, b, c in short stages, a, b1, b2, ... in long ones."""
    if _BLOCKS[stage] == 3:
        return "abc"[block]
    return f"b{block}" if block else "a"


_CAFFE = (
    Rule("backbone.conv1.weight", "conv1.0"),
    *_caffe_norm("backbone.bn1", "_conv1"),
    *(
        rule
        for stage, blocks in _BLOCKS.items()
        for block in range(blocks)
        for conv, norm, branch, _ in _BRANCHES
        for at in (f"backbone.layer{int(stage) - 1}.{block}",)
        for caffe in (f"{stage}{_letter(stage, block)}_branch{branch}",)
        for rule in (
            Rule(f"{at}.{conv}.weight", f"res{caffe}.0"),
            *_caffe_norm(f"{at}.{norm}", caffe),
        )
    ),
    *(
        Rule(
            f"aspp.conv2d_list.{{i}}.{name}",
            (f"fc1_voc12_c{{i}}.{at}", f"fc1_voc12_c_{{i}}.{at}", f"fc1_coco_c{{i}}.{at}"),
        )
        for name, at in (("weight", 0), ("bias", 1))
    ),
)

_KAZUTO = (
    Rule("backbone.conv1.{p}", "layer1.conv1.conv.{p}"),
    Rule("backbone.bn1.{p}", "layer1.conv1.bn.{p}"),
    *(
        rule
        for conv, norm, _, name in _BRANCHES
        for rule in (
            Rule(
                f"backbone.layer{{i}}.{{j}}.{conv}.{{p}}",
                f"layer{{i+1}}.block{{j+1}}.{name}.conv.{{p}}",
            ),
            Rule(
                f"backbone.layer{{i}}.{{j}}.{norm}.{{p}}",
                f"layer{{i+1}}.block{{j+1}}.{name}.bn.{{p}}",
            ),
        )
    ),
    Rule("aspp.conv2d_list.{i}.{p}", "aspp.c{i}.{p}"),
)

# One head without number, four with: fc6, fc6_1 to fc6_4.
_VGG_CAFFE = (
    *(
        Rule(
            f"fc8_{{i}}.{name}",
            tuple(f"fc8{kind}_{{i}}.{at}" for kind in ("_voc12", "_pascal", "-SEC", "")),
        )
        for name, at in (("weight", 0), ("bias", 1))
    ),
    *(
        Rule(f"fc8.{name}", tuple(f"fc8{kind}.{at}" for kind in ("_voc12", "_pascal", "")))
        for name, at in (("weight", 0), ("bias", 1))
    ),
    Rule("{p}.weight", "{p}.0"),
    Rule("{p}.bias", "{p}.1"),
)

FAMILIES = (
    Family(
        ("DeepLabV2ResNet",),
        ("aspp.{p}",),
        (
            Format(
                "kazuto1011",
                _KAZUTO,
                prefix="base.",
                prefix_if="msc",
                preprocessing="caffe-deeplab",
                options=(("align_corners", False),),
            ),
            Format(
                "isht7",
                (
                    Rule("aspp.{p}", "layer5.{p}"),
                    Rule("backbone.{p}", "{p}"),
                ),
                prefix="Scale.",
                preprocessing="caffe-deeplab",
            ),
            Format(
                "caffe",
                _CAFFE,
                (
                    Extra("{p}_res05.{i}", "copy", "{p}.{i}"),
                    Extra("{p}_res075.{i}", "copy", "{p}.{i}"),
                ),
                preprocessing="caffe-deeplab",
                suffix=".caffemodel",
                counters=False,
            ),
            Format(
                "torchvision-backbone",
                (Rule("backbone.{p}", "{p}"),),
                (Extra("fc.{p}", "unused", "scores of ImageNet's classes"),),
                preprocessing="imagenet",
                optional=("aspp.{p}",),
                auto=False,
            ),
        ),
    ),
    Family(
        ("DeepLabV2VGG",),
        ("fc8{p}",),
        (
            Format(
                "rulixiang",
                (
                    Rule("conv{i}_{j}.{p}", "block_{i}.conv{j}.{p}"),
                    Rule("fc{i}.{p}", "conv{i}.{p}"),
                ),
                preprocessing="caffe-deeplab",
                source="rulixiang/deeplab-pytorch: dataset/voc.py, mean_bgr of config/*.yaml",
                options=(("ceil_mode", False),),
            ),
            Format(
                "hal42",
                (
                    Rule("conv{i}_{j}.{p}", "VGGFeature.layer{i}.conv_relu_{j}.conv{i}_{j}.{p}"),
                    Rule("fc8_{j}.{p}", "VGGASPP.aspp_branch{j}.fc8_pascal_{j}.{p}"),
                    Rule("fc{i}_{j}.{p}", "VGGASPP.aspp_branch{j}.aspp_layer{i}_{j}.fc{i}_{j}.{p}"),
                ),
                preprocessing=None,
                source="HAL-42/AlchemyCat: its VOC loader of 2020 has caffe-deeplab's mean, that "
                "of 2023 RGB with CLIP's mean and deviation",
            ),
            Format("caffe", _VGG_CAFFE, preprocessing="caffe-deeplab", suffix=".caffemodel"),
        ),
    ),
)
