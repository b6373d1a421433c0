# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation and ReLU as part of the convolutions before them, for inference."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ._batchnorm import is_fixed
from ._hooks import has_hooks
from .atrous_conv import AtrousConv2d

_Model = TypeVar("_Model", bound=nn.Module)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("pydense.nn") or super().is_leaf_module(
            m, module_qualified_name
        )


def fold_batchnorm(model: _Model) -> _Model:
    """Makes batch normalisation part of the convolution before it, in place, for inference.

    Where an ``nn.Conv2d`` (an :class:`AtrousConv2d` too) is followed by an ``nn.BatchNorm2d`` and
    nothing else reads its result or stands between (an activation of the convolution's own), the
    convolution gets the weight and bias of both
    (:func:`torch.nn.utils.fusion.fuse_conv_bn_eval`), and an ``nn.Identity`` stands in the place of
    the normalisation. Where the convolution is an :class:`AtrousConv2d` and an ``nn.ReLU`` follows
    that nobody else calls, it becomes part of the convolution, too. What follows what is found by
    tracing the model (:mod:`torch.fx`). :class:`ASPP` and :class:`AtrousSeparableConv2d` do all
    this by themselves, in ``eval()``.

    The keys of the model change: load checkpoints before. Layers with hooks, those that several
    places call, and those in training stay what they are.

    Args:
        model: In ``eval()``; parts of it may be in training.

    Returns:
        The model.

    Raises:
        TypeError: Something else than a module.
        ValueError: A model in training, or one that cannot be traced; call it for the parts that
            can, such as ``model.backbone``.

    Example:
        >>> from torch import nn
        >>> from pydense.nn import fold_batchnorm
        >>> fold_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval())[1]
        Identity()
    """
    op = "fold_batchnorm"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError(f"{op}: model must be in eval(), got one in training")
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"{op}: model must be one that torch.fx can trace (call this for the parts that are), "
            f"got {type(error).__name__}: {error}"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = _calls(graph, modules)
    for node in list(graph.nodes):
        conv = _alone(node, modules, calls)
        if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, AtrousConv2d):
            continue
        follower = _follower(node)
        norm = None if follower is None else _alone(follower, modules, calls)
        active = getattr(conv, "activation", None) is not None  # stands before the normalisation
        if follower is not None and type(norm) is nn.BatchNorm2d and is_fixed(norm) and not active:
            conv = fuse_conv_bn_eval(conv, norm)
            _put(model, str(node.target), conv)
            _put(model, str(follower.target), nn.Identity())
            follower = _follower(follower)
        if follower is not None and isinstance(conv, AtrousConv2d):
            relu = _alone(follower, modules, calls)
            if type(relu) is nn.ReLU:
                conv.activation = "relu"
                _put(model, str(follower.target), nn.Identity())
    return model


def _calls(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[int, int]:
    """How often each module is called or otherwise read, by its id."""
    counts: dict[int, int] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            target = target.rpartition(".")[0]
        if node.op in ("call_module", "get_attr"):
            module = id(modules[target])
            counts[module] = counts.get(module, 0) + 1
    return counts


def _alone(node: fx.Node, modules: dict[str, nn.Module], calls: dict[int, int]) -> nn.Module | None:
    """The module of a call, where it is for inference and this call is all that knows it."""
    if node.op != "call_module" or len(node.args) + len(node.kwargs) != 1:
        return None
    module = modules[str(node.target)]
    names = sum(other is module for other in modules.values())
    watched = has_hooks(module) or hasattr(module, "parametrizations")
    fits = calls[id(module)] == names == 1 and not watched and not module.training
    return module if fits else None


def _follower(node: fx.Node) -> fx.Node | None:
    """What alone reads a result."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _put(model: nn.Module, name: str, module: Any) -> None:
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent)._modules[own] = module
