# SPDX-License-Identifier: Apache-2.0
"""What the tests of the reference models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from _deeplab import fill_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

from pydense.models import SegmentationModel, _resnet, get_model, reference_twin

Build = Callable[[], SegmentationModel]


def parameters(name: str, **options) -> int:
    """Count of a published configuration's parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in get_model(name, **options).parameters())


def sizes(name: str, height: int, width: int, **options) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of low-resolution logits and logits, without computing them."""
    with FakeTensorMode(), torch.no_grad():
        model = get_model(name, **options).eval()
        x = torch.empty(1, 3, height, width)
        low = model(x, low_resolution=True)
        return tuple(low.shape), tuple(model.upsample(low, (height, width)).shape)


def filled(model: SegmentationModel, seed: int = 0) -> SegmentationModel:
    """The model in ``eval()``, with statistics of a trained one and scores that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    fill_norms(model, scale=0.7)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, 0, 0.1, generator)
    return model.eval()


def picture(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@contextmanager
def small_resnet() -> Iterator[int]:
    """A depth of one block for each layer."""
    _resnet.LAYERS[14] = (1, 1, 1, 1)
    try:
        yield 14
    finally:
        del _resnet.LAYERS[14]


@torch.no_grad()
def check_size(model: SegmentationModel, height: int, width: int) -> None:
    """Logits of the input's size; labels are theirs wherever these are sure of it."""
    x = picture(1, 3, height, width, seed=height * 1000 + width)
    logits = model(x)
    assert logits.shape == (1, model.num_classes, height, width)
    assert torch.isfinite(logits).all()
    top = logits.topk(2, 1).values
    sure = top[:, 0] - top[:, 1] > 1e-4 * logits.abs().max()
    labels = model.predict(x)
    assert labels.shape == (1, height, width)
    assert torch.equal(labels[sure], logits.argmax(1)[sure])
    assert sure.float().mean() > 0.5


def check_any_size(model: SegmentationModel, examples: int) -> None:
    """:func:`check_size` of pictures of 33 to 200 rows and columns."""

    @settings(max_examples=examples)
    @given(st.integers(33, 200), st.integers(33, 200))
    def check(height: int, width: int) -> None:
        check_size(model, height, width)

    check()


def check_twin(build: Build, size: Sequence[int] = (33, 42)) -> None:
    """Float32 outputs to 1e-4 of their deviation, float64 outputs and gradients to 1e-8."""
    own = filled(build())
    twin = reference_twin(own)
    x = picture(2, 3, *size)
    with torch.no_grad():
        a, b = own(x), twin(x)
        assert (a - b).abs().max() <= 1e-4 * a.std()
    own, twin = own.double(), twin.double()
    target = torch.randint(own.num_classes, (1, *size), generator=torch.Generator().manual_seed(2))
    target[:, : size[0] // 4] = 255
    found = []
    for model in (own, twin):
        x = picture(1, 3, *size, dtype=torch.float64).requires_grad_()
        logits = model(x)
        loss = model.loss(x, target) + 0.01 * logits.square().mean()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len([*model.parameters()])
        found.append([logits.detach(), loss.detach(), x.grad, *gradients])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-8 * max(1.0, float(a.abs().max()))


def check_loss(model: SegmentationModel, size: Sequence[int] = (37, 50), **options) -> None:
    """The fused loss is that of the upsampled logits."""
    x = picture(2, 3, *size)
    target = torch.randint(
        model.num_classes, (2, *size), generator=torch.Generator().manual_seed(3)
    )
    target[:, :5] = 255
    weight = torch.linspace(0.5, 1.5, model.num_classes)
    with torch.no_grad():
        for reduction in ("mean", "sum", "mean_all"):
            got = model.loss(x, target, reduction=reduction, weight=weight, **options)
            expected = 0.0
            for factor, low in zip(model.output_weights, model.forward_outputs(x), strict=True):
                term = nn.functional.cross_entropy(
                    model.upsample(low, tuple(size)),
                    target,
                    weight,
                    ignore_index=255,
                    reduction="mean" if reduction == "mean" else "sum",
                )
                expected += factor * term / (target.numel() if reduction == "mean_all" else 1)
            assert torch.allclose(got, expected, rtol=1e-4)


def check_graph(
    model: SegmentationModel, size: Sequence[int] = (37, 50), twin_too: bool = False
) -> None:
    """compile(fullgraph) and export with dynamic height and width; where said the twin's too."""
    x, other = picture(1, 3, *size), picture(1, 3, 45, 77)
    dynamic = ({2: Dim("height", min=33, max=500), 3: Dim("width", min=33, max=500)},)
    for candidate in [model, reference_twin(model)][: 2 if twin_too else 1]:
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(candidate, fullgraph=True, backend="aot_eager")
            assert torch.allclose(compiled(x), candidate(x), rtol=1e-4, atol=1e-5)
            # einsum, in the reference, compares sizes: asserts that are always true.
            program = export(
                candidate,
                (x,),
                dynamic_shapes=dynamic,
                prefer_deferred_runtime_asserts_over_guards=candidate is not model,
            )
            assert torch.allclose(program.module()(other), candidate(other), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def check_inductor(model: SegmentationModel, size: Sequence[int] = (37, 50)) -> None:
    """torch.compile with its own back end."""
    torch._dynamo.reset()
    x = picture(1, 3, *size)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        assert torch.allclose(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
