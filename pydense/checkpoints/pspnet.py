# SPDX-License-Identifier: Apache-2.0
"""PSPNet: the authors' semseg."""

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

FAMILIES = (
    Family(
        ("PSPNet",),
        ("cls.4.{p}", "aux.4.{p}"),
        (Format("semseg", _SEMSEG, prefix="module.", preprocessing="imagenet"),),
    ),
)
