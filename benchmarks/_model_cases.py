# SPDX-License-Identifier: Apache-2.0
"""Whole reference models and their heads, beside the same models in torch's own operators.

The rivals are the model's twin: the same layers and weights, with torch's operators in the place of
pydense's, each called as a user would call it: ``F.interpolate``, a transposed convolution and a
crop, ``F.max_pool2d``, ``argmax`` and ``F.cross_entropy`` of logits of full resolution. They run
eagerly in both memory formats, and through ``torch.compile``; so does pydense, in channels_last.

Inference ends with labels of the input's size. A training step is the loss at full resolution
(forward) and the gradients of all parameters (backward); dropout is off, so that losses can be
compared. Heads get the maps of their backbone, which itself is not run.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks._harness import Case, Rival
from benchmarks._model_operators import torch_operators

OURS = "pydense"
OURS_LAST = "pydense channels_last"
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # in names
OURS_COMPILED = "pydense torch.compile channels_last"
SEED = 1
PLAIN, LAST = torch.contiguous_format, torch.channels_last

# Label: operators, memory format, compiled.
RIVALS: Mapping[str, tuple[str, torch.memory_format, bool]] = {
    OURS: ("pydense", PLAIN, False),
    OURS_LAST: ("pydense", LAST, False),
    OURS_COMPILED: ("pydense", LAST, True),
    "torch NCHW": ("torch", PLAIN, False),
    "torch channels_last": ("torch", LAST, False),
    "torch.compile": ("torch", PLAIN, True),
    "torch.compile channels_last": ("torch", LAST, True),
}
COMPILED = tuple(label for label, (_, _, compiled) in RIVALS.items() if compiled)


def _features(model: Any, x: Tensor) -> Iterable[Tensor]:
    found: Iterable[Tensor] = model.features(x).values()
    return found


class Head(NamedTuple):
    """From a model and its maps to low-resolution logits; from it and a picture to the maps."""

    logits: Callable[[Any, list[Tensor]], Tensor]
    maps: Callable[[Any, Tensor], Iterable[Tensor]] = _features


@dataclass(frozen=True)
class Problem:
    """A model, or its head, at one size.

    Attributes:
        model: Name in ``list_models()``.
        size: Rows and columns of the picture.
        dtype: Of weights and picture.
        training: A training step instead of inference.
        head: What is measured; None for the whole.
        options: Of the model's constructor.
        loss: Options of its ``loss``.
    """

    model: str
    size: int
    dtype: torch.dtype
    training: bool = False
    head: Head | None = None
    options: Mapping[str, Any] | None = None
    loss: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Kind, model, size and dtype."""
        what = "head" if self.head else "model"
        step = "training" if self.training else "inference"
        return f"{what}-{step}/{self.model}/{self.size}x{self.size}/{DTYPES[self.dtype]}"


class _Models:
    """The models of a case, each built when it is first called; weights are shared."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.made: dict[tuple[str, torch.memory_format], tuple[Any, list[Tensor], Tensor]] = {}

    def _first(self) -> Any:
        from pydense.models import get_model

        torch.manual_seed(SEED)
        model: Any = get_model(self.problem.model, **(self.problem.options or {}))
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        for p in model.parameters():
            if p.dim() > 1 and not bool(p.any()):  # classifiers that start from zero
                nn.init.normal_(p, std=0.01)
        return model.to(self.problem.dtype).train(self.problem.training)

    def get(self, operators: str, layout: torch.memory_format) -> tuple[Any, list[Tensor], Tensor]:
        """The model, its inputs (a picture, or the maps of its backbone) and the target."""
        from pydense.nn import use_operators
        from pydense.nn._operators import OPERATORS

        OPERATORS.setdefault("torch", torch_operators())
        key = (operators, layout)
        if key not in self.made:
            if layout is PLAIN and self.made:
                # Parameters and buffers are the same tensors.
                first = next((m for (_, f), (m, *_) in self.made.items() if f is PLAIN), None)
            else:
                first = None
            if first is None:
                model = self._first().to(memory_format=layout)
            else:
                kept = {id(t): t for t in (*first.parameters(), *first.buffers())}
                model = copy.deepcopy(first, kept)
            use_operators(model, operators)
            self.made[key] = (model, *self._inputs(model, layout))
        return self.made[key]

    def _inputs(self, model: Any, layout: torch.memory_format) -> tuple[list[Tensor], Tensor]:
        size, generator = self.problem.size, torch.Generator().manual_seed(SEED)
        # Batch normalisation of an image's mean needs two in training.
        images = 2 if self.problem.training else 1
        x = torch.randn(images, 3, size, size, generator=generator).to(self.problem.dtype)
        target = torch.randint(model.num_classes, (images, size, size), generator=generator)
        x = x.contiguous(memory_format=layout)
        if self.problem.head is None:
            return [x], target
        with torch.no_grad():
            maps = [y.clone(memory_format=layout) for y in self.problem.head.maps(model, x)]
        return maps, target


def _inference(problem: Problem, models: _Models, label: str) -> Callable[[], Any]:
    operators, layout, compiled = RIVALS[label]
    size = (problem.size, problem.size)

    def run(model: Any, inputs: list[Tensor]) -> Tensor:
        if problem.head is None:
            if operators == "pydense":
                labels: Tensor = model.predict(inputs[0])
                return labels
            found: Tensor = model(inputs[0]).argmax(1)
            return found
        low = problem.head.logits(model, inputs)
        labels = model.operators.upsample_argmax(low, size, model.align_corners)
        return labels

    call = torch.compile(run) if compiled else run

    def measured() -> Tensor:
        model, inputs, _ = models.get(operators, layout)
        with torch.no_grad():
            return call(model, inputs)

    return measured


def _training(problem: Problem, models: _Models, label: str) -> Mapping[str, Callable[[Any], Any]]:
    operators, layout, compiled = RIVALS[label]
    size = (problem.size, problem.size)

    def run(model: Any, inputs: list[Tensor], target: Tensor) -> Tensor:
        if problem.head is None and operators == "torch":
            rows = zip(model.output_weights, model.forward_outputs(inputs[0]), strict=True)
            losses = [
                factor * cross_entropy(model.upsample(low, size), target, ignore_index=255)
                for factor, low in rows
            ]
            return torch.stack(losses).sum()
        if problem.head is None:
            loss: Tensor = model.loss(inputs[0], target, **(problem.loss or {}))
            return loss
        low = problem.head.logits(model, inputs)
        loss = model.operators.upsample_cross_entropy(
            low, target, align_corners=model.align_corners, ignore_index=255
        )
        return loss

    call = torch.compile(run) if compiled else run

    def forward(_: Any) -> Tensor:
        model, inputs, target = models.get(operators, layout)
        if problem.head is not None:
            for x in inputs:
                x.requires_grad_()
        return call(model, inputs, target)

    def backward(loss: Tensor) -> Tensor:
        model, inputs, _ = models.get(operators, layout)
        wanted = [p for p in model.parameters() if p.requires_grad]
        wanted += inputs if problem.head is not None else []
        torch.autograd.grad(loss, wanted, allow_unused=True)
        return loss.detach()

    return {"forward": forward, "backward": backward}


def compare(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """Labels that differ from pydense's, or the relative difference of the loss."""
    own = results[OURS]
    found: dict[str, dict[str, float]] = {}
    for label, out in results.items():
        if label == OURS:
            continue
        if own.dim() == 0:
            found[label] = {"relative_difference_of_loss": float(abs(out - own) / abs(own))}
        else:
            found[label] = {"share_of_labels_that_differ": float((out != own).float().mean())}
    return found


def case_of(problem: Problem) -> Case:
    """The harness case of a problem."""
    alive: list[weakref.ref[_Models]] = []

    def setup() -> Mapping[str, Rival]:
        models = _Models(problem)
        alive[:] = [weakref.ref(models)]
        make: Any = _training if problem.training else _inference
        return {label: make(problem, models, label) for label in RIVALS}

    def prime(label: str) -> None:
        """Builds the one model whose memory is to be measured."""
        models = alive[0]()
        assert models is not None
        operators, layout, _ = RIVALS[label]
        models.get(operators, layout)

    return Case(
        name=problem.name,
        setup=setup,
        variants=[OURS_LAST, OURS_COMPILED],
        params={"size": problem.size, "dtype": str(problem.dtype).removeprefix("torch.")},
        check=compare,
        prime=prime,
    )


def _child(name: str) -> Head:
    """A head that is one child on the last map."""
    return Head(lambda model, maps: model.get_submodule(name)(maps[-1]))


def _pspnet(model: Any, maps: list[Tensor]) -> Tensor:
    out: Tensor = model.cls(model.ppm(maps[-1]))
    return out


def _refinenet(model: Any, maps: list[Tensor]) -> Tensor:
    out: Tensor = model.clf_conv(model.do(model.refine(maps)["0"]))
    return out


def _hrnet(model: Any, maps: list[Tensor]) -> Tensor:
    out: Tensor = model.last_layer(maps)
    return out


# Model, size, whether it is trained in a case too, options of its loss.
_FULL = {"shrink_labels": False}
WHOLE: tuple[tuple[str, int, bool, Mapping[str, Any]], ...] = (
    ("fcn8s_vgg16", 225, False, {}),
    ("fcn_alexnet", 225, True, {}),
    ("deeplab_largefov_vgg16", 321, True, _FULL),
    ("deeplab_v2_vgg16", 321, True, _FULL),
    ("deeplab_v2_resnet101_single_scale", 321, True, _FULL),
    ("deeplab_v2_resnet101", 321, False, {}),
    ("deeplab_v3_resnet50", 321, True, {}),
    ("pspnet_resnet50", 321, True, {}),
    ("refinenet101", 321, True, {}),
    ("lw_refinenet50", 321, True, {}),
    ("lw_refinenet_mobilenet_v2", 321, True, {}),
    ("hrnet_w18", 321, True, {}),
    ("hrnet_w48", 321, False, {}),
    ("hrnet_ocr_w18", 321, True, {}),
    ("unet", 225, True, {}),
    ("segnet", 225, False, {}),
)
HEADS: tuple[tuple[str, int, Head], ...] = (
    ("deeplab_v2_resnet101_single_scale", 321, _child("aspp")),
    ("deeplab_v3_resnet50", 321, _child("classifier")),
    ("fcn_resnet50", 321, _child("classifier")),
    ("pspnet_resnet50", 321, Head(_pspnet)),
    ("refinenet101", 321, Head(_refinenet, lambda model, x: model.trunk(x))),
    ("hrnet_w18", 321, Head(_hrnet)),
    ("hrnet_w48", 321, Head(_hrnet)),
)


def problems() -> list[Problem]:
    """What the benchmark measures."""
    found = []
    for dtype in DTYPES:
        for model, size, head in HEADS:
            found += [Problem(model, size, dtype, training, head) for training in (False, True)]
        for model, size, trains, loss in WHOLE:
            for training in (False, True)[: 2 if trains else 1]:
                found.append(Problem(model, size, dtype, training, None, None, loss))
    return found


def quick_problems() -> list[Problem]:
    """Small ones, to see that everything works."""
    thin, full = {"width": 4}, torch.float32
    narrow = {"fc_channels": 16}
    return [
        Problem("unet_bilinear", 33, full, False, None, thin),
        Problem("unet", 35, torch.bfloat16, True, None, thin),
        Problem("fcn_alexnet", 40, full, True, None, narrow),
        Problem("deeplab_v3_resnet50", 49, full, True, _child("classifier")),
        Problem("deeplab_v2_resnet101_single_scale", 41, full, False, _child("aspp")),
    ]


def missing(case: Case) -> str:
    """Why a case cannot run: its model is not there."""
    from pydense.models import list_models

    model = case.name.split("/")[1]
    return "" if model in list_models() else f"there is no model {model}"
