# SPDX-License-Identifier: Apache-2.0
"""PSPNet: the authors' semseg, and their Caffe nets."""

from torch import nn

from ._rules import SAME, Family, Format, Rule

_SEMSEG = (
    # layer0 holds convolution, norm and activation in turn.
    *(
        rule
        for i in range(3)
        for rule in (
            Rule(f"backbone.conv{i + 1}.{{p}}", f"layer0.{3 * i}.{{p}}"),
            Rule(f"backbone.bn{i + 1}.{{p}}", f"layer0.{3 * i + 1}.{{p}}"),
        )
    ),
    Rule("backbone.{p}", "{p}"),
    SAME,
)

_NORM = ("weight", "bias", "running_mean", "running_var")
_BRANCHES = (
    ("conv1", "bn1", "1x1_reduce"),
    ("conv2", "bn2", "3x3"),
    ("conv3", "bn3", "1x1_increase"),
    ("downsample.0", "downsample.1", "1x1_proj"),
)


def _caffe(conv: str, norm: str, theirs: str) -> tuple[Rule, ...]:
    """A convolution, and the four blobs of its BN layer."""
    return (
        Rule(f"{conv}.weight", f"{theirs}.0"),
        *(
            Rule(f"{norm}.{name}", f"{theirs}/bn.{blob}", "channels")
            for blob, name in enumerate(_NORM)
        ),
    )


_CAFFE = (
    *(
        rule
        for i, name in enumerate(("1_3x3_s2", "2_3x3", "3_3x3"))
        for rule in _caffe(f"backbone.conv{i + 1}", f"backbone.bn{i + 1}", f"conv1_{name}")
    ),
    *(
        rule
        for conv, norm, name in _BRANCHES
        for rule in _caffe(
            f"backbone.layer{{i}}.{{j}}.{conv}",
            f"backbone.layer{{i}}.{{j}}.{norm}",
            f"conv{{i+1}}_{{j+1}}_{name}",
        )
    ),
    *(
        rule
        for i, bins in enumerate((1, 2, 3, 6))
        for rule in _caffe(f"ppm.features.{i}.1", f"ppm.features.{i}.2", f"conv5_3_pool{bins}_conv")
    ),
    # The coarsest grid comes last there.
    Rule("cls.0.weight", "conv5_4.0", "pyramid"),
    *_caffe("cls.0", "cls.1", "conv5_4")[1:],
    Rule("cls.4.weight", "conv6.0"),
    Rule("cls.4.bias", "conv6.1"),
)


def _stride_on(model: nn.Module) -> str | None:
    """As pspnet50_ADE20K_473.prototxt and pspnet101_*.prototxt have it; there is no third."""
    return {50: "1x1", 101: "3x3"}.get(int(getattr(model, "depth", 0)))


FAMILIES = (
    Family(
        ("PSPNet",),
        ("cls.4.{p}", "aux.4.{p}"),
        (
            Format("semseg", _SEMSEG, prefix="module.", preprocessing="imagenet"),
            Format(
                "caffe",
                _CAFFE,
                preprocessing="caffe-vgg",
                source="hszhao/PSPNet: evaluation/eval_all.m",
                suffix=".caffemodel",
                counters=False,
                options=(("aux", False), ("stride_on", _stride_on), ("ceil_mode", True)),
            ),
        ),
    ),
)
