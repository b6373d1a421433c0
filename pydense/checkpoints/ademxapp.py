# SPDX-License-Identifier: Apache-2.0
"""Wider ResNet-38: mapillary's inplace_abn, whose keys the trunk has, and ademxapp's MXNet."""

from ._rules import Family, Format, Rule

_BLOCKS = (3, 3, 6, 3, 1, 1)  # of levels 2 to 7
_NORM = (
    ("weight", "arg", "gamma"),
    ("bias", "arg", "beta"),
    ("running_mean", "aux", "moving_mean"),
    ("running_var", "aux", "moving_var"),
)


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{ours}.{own}", f"{kind}:{theirs}_{name}") for own, kind, name in _NORM)


def _levels() -> tuple[Rule, ...]:
    """res4a, res4b1, res4b2, ...; its convolutions are branch2a, branch2b1, branch2b2."""
    rules: list[Rule] = []
    for level, blocks in enumerate(_BLOCKS, 2):
        for block in range(blocks):
            ours = f"mod{level}.block{block + 1}"
            name = f"{level}{f'b{block}' if block else 'a'}"
            for index, branch in enumerate(("2a", "2b1", "2b2")):
                norm = f"{ours}.convs.bn{index + 1}" if index else f"{ours}.bn1"
                rules += _norm(norm, f"bn{name}_branch{branch}")
                weight = f"{ours}.convs.conv{index + 1}.weight"
                rules.append(Rule(weight, f"arg:res{name}_branch{branch}_weight"))
            rules.append(Rule(f"{ours}.proj_conv.weight", f"arg:res{name}_branch1_weight"))
    return tuple(rules)


_TRUNK = (
    Rule("mod1.conv1.weight", "arg:conv1a_weight"),
    *_levels(),
    *_norm("bn_out", "bn7"),
    Rule("conv6a.{p}", "arg:conv6a_{p}"),
)


def _linear(ours: str) -> tuple[Rule, ...]:
    """The last layer's name holds the number of its outputs."""
    return (Rule(f"{ours}.{{p}}", "arg:linear{classes}_{p}"),)


FAMILIES = tuple(
    Family(
        (model,),
        (f"{linear}.{{p}}",),
        (
            Format("mapillary", preprocessing="imagenet"),
            Format(
                "ademxapp",
                (*_TRUNK, *_linear(linear)),
                preprocessing="imagenet",
                suffix=".params",
                counters=False,
            ),
        ),
    )
    for model, linear in (("WiderResNet38", "classifier.fc"), ("FCRN", "linear"))
)
