# SPDX-License-Identifier: Apache-2.0
"""Beside _models.py: counts, numbers for all weights, twins and sizes of networks so filled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _ops import random
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from pydense.models import SegmentationModel, get_model, reference_twin


def on_meta(build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with torch.device("meta"):
        return build(*arguments, **options)


def count(build: Callable[..., nn.Module], *arguments: Any, **options: Any) -> int:
    """Parameters, without memory for them."""
    with torch.device("meta"):
        model = build(*arguments, **options)
    return sum(p.numel() for p in model.parameters())


def summary(name: str, size: tuple[int, int], **options: Any) -> tuple[int, int, tuple[int, ...]]:
    """Parameters, entries of the state_dict and the shape of the logits of low resolution.

    Without memory for any; logits of full resolution have the size of the input.
    """
    with FakeTensorMode():
        model = get_model(name, **options).eval()
        low = model.forward_low(torch.empty(1, 3, *size))
        assert model.upsample(low, size).shape == (1, model.num_classes, *size)
        parameters = sum(p.numel() for p in model.parameters())
        return parameters, len(model.state_dict()), tuple(low.shape)


def fill(model: nn.Module, *last: str, seed: int = 0) -> Any:
    """Numbers that a trained model may have, in eval mode; the ``last`` layers give about 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1, generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator)
            nn.init.uniform_(module.weight, 0.5, 1.2, generator)
            nn.init.normal_(module.bias, 0, 0.1, generator)
        elif isinstance(weight, nn.Parameter) and weight.dim() > 1:
            nn.init.normal_(weight, 0, (2 / weight[0].numel()) ** 0.5, generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1, generator)
    model.eval()
    for name in last:
        layer = model.get_submodule(name)
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(random(1, 3, 64, 64, seed=1))
        hook.remove()
        with torch.no_grad():
            layer.weight /= seen[0].std()
    return model


def check_twins(
    model: SegmentationModel, size: tuple[int, int] = (45, 50), of_picture: bool = True
) -> None:
    """Logits in float32 and float64, and all gradients of the loss in float64."""
    x = random(2, 3, *size, seed=3)
    twin = reference_twin(model)
    with torch.no_grad():
        own, plain = model(x), twin(x)
    assert own.shape == plain.shape == (2, model.num_classes, *size)
    assert (own - plain).abs().max() <= 1e-4 * plain.std()
    target = torch.randint(model.num_classes, (2, *size), generator=torch.manual_seed(4))
    target[:, :5] = 255
    found = []
    for net in (copy.deepcopy(model).double(), twin.double()):
        picture = x.double().requires_grad_(of_picture)
        outputs = [y.detach() for y in net.forward_outputs(picture)]
        logits = net(picture).detach()
        loss = net.loss(picture, target)
        loss.backward()
        gradients = [p.grad for p in net.parameters()] + [picture.grad] * of_picture
        assert all(g is not None and g.isfinite().all() for g in gradients)
        found.append([loss.detach(), *outputs, logits, *gradients])
    largest = max(float(g.abs().max()) for g in found[1][-len(gradients) :])
    for index, (own, plain) in enumerate(zip(*found, strict=True)):
        # A weight that the loss hardly depends on has rounding errors of the others' size.
        floor = largest if index >= len(found[1]) - len(gradients) else 0.0
        assert (own - plain).abs().max() <= 1e-8 * max(float(plain.abs().max()), floor)


def check_classifiers(model: nn.Module, twin: nn.Module) -> None:
    """As :func:`check_twins`, of networks with one vector of logits for a picture."""
    twin.eval().load_state_dict(model.state_dict())
    x = random(2, 3, 45, 50, seed=3)
    with torch.no_grad():
        own, plain = model(x), twin(x)
    assert (own - plain).abs().max() <= 1e-4 * plain.std()
    found = []
    for net in (copy.deepcopy(model).double(), twin.double()):
        picture = x.double().requires_grad_()
        logits = net(picture)
        gradients = torch.autograd.grad(logits.square().sum(), [picture, *net.parameters()])
        found.append([logits.detach(), *gradients])
    largest = max(float(g.abs().max()) for g in found[1])
    for own, plain in zip(*found, strict=True):
        assert (own - plain).abs().max() <= 1e-8 * largest


def check_size(model: SegmentationModel, size: tuple[int, int], stride: int) -> None:
    """Sizes of logits, and labels that are those of the logits."""
    x = random(1, 3, *size, seed=sum(size))
    with torch.no_grad():
        full, low = model(x), model(x, low_resolution=True)
    classes = model.num_classes
    assert low.shape == (1, classes, *(-(-n // stride) for n in size))
    assert full.shape == (1, classes, *size)
    expected = functional.interpolate(low, size, mode="bilinear", align_corners=model.align_corners)
    assert torch.allclose(full, expected, rtol=1e-4, atol=1e-4 * float(full.std()))
    labels = model.predict(x)
    two = full.topk(2, 1).values
    clear = two[:, 0] - two[:, 1] > 1e-3 * full.std()
    assert labels.shape == (1, *size) and clear.float().mean() > 0.9
    assert torch.equal(labels[clear], full.argmax(1)[clear])


def check_dtypes(model: SegmentationModel, size: tuple[int, int] = (45, 50)) -> None:
    """Autocast to bfloat16 with no more error than the twin's; channels_last is kept."""
    x = random(1, 3, *size, seed=5)
    twin = reference_twin(model)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = [net(x) for net in (model, twin)]
        errors = [float((y.float() - exact).square().mean().sqrt()) for y in found]
        assert found[0].dtype == found[1].dtype == torch.bfloat16
        assert errors[0] <= 1.5 * errors[1]
        last = model(x.contiguous(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert (last - exact).abs().max() <= 1e-4 * exact.std()


def check_errors(build: Callable[..., nn.Module], cases: dict[str, Any], **fixed: Any) -> None:
    """Each wrong argument alone is refused by its name."""
    for name, value in cases.items():
        with torch.device("meta"), pytest.raises((ValueError, TypeError), match=f"{name} must"):
            build(**{**fixed, name: value})
