# SPDX-License-Identifier: Apache-2.0
"""Fully connected layers as convolutions: how FCNs get the weights of classifiers.

Source: the notebook "net surgery" of Caffe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def transplant_fc_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Fills convolutions with the numbers of fully connected layers, and others as they are.

    "Net surgery": a fully connected layer (4096, 512 * 7 * 7) over a 7x7 map is a 7x7 convolution
    (4096, 512, 7, 7) with the same numbers in the same order. Every parameter of the model that
    ``state_dict`` has under its name, with the same count of numbers and of outputs, is copied so;
    what it has not stays. Blobs as :func:`pydense.checkpoints.read` names those of a
    ``.caffemodel`` (``conv1_1.0``, ``conv1_1.1``) are weights and biases, for :class:`FCN` those of
    VGG16, for :class:`FCNAlexNet` of ``bvlc_alexnet`` or CaffeNet. From torchvision's VGG16 too:
    ``features.N`` are the convolutions in their order, the first two linear layers of
    ``classifier`` ``fc6`` and ``fc7`` (their input is RGB of another scale). Not from its AlexNet,
    whose convolutions are 64, 192, 384, 256 and 256 wide and without groups.

    A 16s net from a 32s net, or an 8s from a 16s, begins as its function, upsampled in more steps.

    Args:
        model: :class:`FCN`, :class:`FCNAlexNet`, or any with Caffe's names.
        state_dict: Of the classifier, or of a coarser net.

    Returns:
        Keys of the model that were filled.

    Raises:
        ValueError: Nothing fits; or a key fits in name but not in the count of its numbers, but for
            scores of another number of classes.
    """
    op = "transplant_fc_weights"
    own = dict(model.named_parameters())
    source = _caffe_names(state_dict, [key for key in own if key.startswith("conv")])
    filled = []
    with torch.no_grad():
        for key, parameter in own.items():
            if key not in source:
                continue
            value = _outputs_first(source[key], parameter)
            if value.numel() != parameter.numel() or value.shape[0] != parameter.shape[0]:
                if key.startswith("score"):
                    continue
                raise ValueError(
                    f"{op}: {key} must have {parameter.numel()} numbers for the shape "
                    f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
                )
            parameter.copy_(value.reshape(parameter.shape))
            filled.append(key)
    if not filled:
        raise ValueError(f"{op}: state_dict must share names with model, got {[*state_dict][:5]}")
    return filled


def _outputs_first(value: Tensor, like: Tensor) -> Tensor:
    """Without the leading ones of old Caffe, which gives every blob four dimensions."""
    if value.dim() == 4:
        while value.dim() > 1 and value.shape[0] == 1 != like.shape[0]:
            value = value[0]
    return value


def _caffe_names(
    state_dict: Mapping[str, Tensor], convolutions: Sequence[str]
) -> dict[str, Tensor]:
    """Names of torchvision and of Caffe's blobs as those of Caffe's layers; these as they are."""
    if all(key.rpartition(".")[2].isdigit() for key in state_dict):
        ends = {"0": "weight", "1": "bias"}
        rows = [(key.rpartition("."), value) for key, value in state_dict.items()]
        return {f"{layer}.{ends[at]}": value for (layer, _, at), value in rows if at in ends}
    features = [key for key in state_dict if key.startswith("features.")]
    if not features:
        return dict(state_dict)
    if len(features) != len(convolutions):
        raise ValueError(
            f"transplant_fc_weights: state_dict must have {len(convolutions)} parameters of "
            f"convolutions, got {len(features)}"
        )
    # In their order, which is not that of the strings.
    features.sort(key=lambda key: (int(key.split(".")[1]), key.endswith("bias")))
    named = {new: state_dict[old] for new, old in zip(convolutions, features, strict=True)}
    linear = [key[: -len(".weight")] for key in state_dict if key.startswith("classifier.")]
    linear = [key for key in linear if f"{key}.weight" in state_dict]
    for new, old in zip(("fc6", "fc7"), sorted(set(linear)), strict=False):
        for part in ("weight", "bias"):
            named[f"{new}.{part}"] = state_dict[f"{old}.{part}"]
    return named
