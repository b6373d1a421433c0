# SPDX-License-Identifier: Apache-2.0
"""The dense CRF as a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pydense.ops import FreeEnergy, dense_crf_energy, dense_crf_free_energy
from pydense.ops import _crf_arguments as check
from pydense.ops._crf_features import check_features

from ._operators import UsesOperators

_OP = "DenseCRF"
# What pydensecrf's example uses.
_GAUSSIAN = MappingProxyType({"sxy": 3, "compat": 3})
_BILATERAL = MappingProxyType({"sxy": 80, "srgb": 13, "compat": 10})


class DenseCRF(UsesOperators, nn.Module):
    """Refines the scores of a segmentation network with a fully connected CRF.

    ``DenseCRF()(logits, image)`` gives the marginals after 10 mean-field iterations with a
    smoothness and an appearance kernel, with the parameters of pydensecrf's example.
    :func:`pydense.ops.dense_crf` has the model, the **table of signs** (a positive ``compat``
    attracts, also as vector and matrix), memory, dtypes and source.

    The compatibilities are buffers of torch's default dtype: they move and change dtype with the
    module (``half()`` rounds them). They are not in the ``state_dict``: a network with this layer
    loads checkpoints made without it. The layer has no parameters; gradients flow through it to the
    logits, the image and the features. :class:`CRFasRNN` is the one that is trained.

    Args:
        gaussian: ``dict(sxy=3, compat=3)``, or other values, or None for no such kernel.
        bilateral: ``dict(sxy=80, srgb=13, compat=10)``, or other values, or None for no such
            kernel.
        features: Further kernels: one ``dict(sigma=..., compat=...)`` for each tensor in the
            ``features`` of the call; ``sigma`` is a number or one per feature, and divides them.
        iterations: Number of mean-field updates.
        normalization: ``"symmetric"``, ``"before"``, ``"after"`` or None.
        self_term: Whether a point's own marginals are part of its messages.
        backend: ``"lattice"`` or ``"exact"``.
        precision: ``"accurate"`` or, with ``backend="exact"`` on a GPU, ``"fast"``.

    Shape:
        - logits: (N, L, H, W), (N, L, D, H, W) or, without ``gaussian`` and ``bilateral``,
          (N, L, P); any strides.
        - image: (N or 1, channels, *spatial), 0..255, uint8 or float; None without ``bilateral``.
        - features: (N or 1, d, *spatial) each.
        - output: probabilities, like ``logits`` in shape, dtype and memory format.

    Raises:
        ValueError: In the constructor or the call, see :func:`pydense.ops.dense_crf`.
        TypeError: In the constructor or the call, see :func:`pydense.ops.dense_crf`.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (cuda), where
            energies are for the CPU alone.

    Example:
        >>> import torch
        >>> from pydense.nn import DenseCRF
        >>> crf = DenseCRF(bilateral=dict(sxy=67, srgb=3, compat=4))
        >>> logits, image = torch.randn(2, 21, 60, 80), torch.randint(256, (2, 3, 60, 80))
        >>> probabilities = crf(logits, image)
        >>> labels = crf.labels(logits, image)
        >>> bool((probabilities.argmax(1) == labels).all())
        True
    """

    def __init__(
        self,
        gaussian: Mapping[str, Any] | None = _GAUSSIAN,
        bilateral: Mapping[str, Any] | None = _BILATERAL,
        features: Sequence[Mapping[str, Any]] = (),
        iterations: int = 10,
        normalization: str | None = "symmetric",
        self_term: bool = True,
        backend: str = "lattice",
        precision: str = "accurate",
    ) -> None:
        super().__init__()
        check.choice(_OP, "normalization", normalization, check.NORMALIZATIONS)
        check.backend(_OP, backend, precision)
        check.flag(_OP, "self_term", self_term)
        self.iterations = check.integer(_OP, "iterations", iterations, 0, check.MAX_ITERATIONS)
        self.normalization = normalization
        self.self_term = self_term
        self.backend = backend
        self.precision = precision
        # The compatibilities aside: those are buffers, <name>_compat.
        self.gaussian = None if gaussian is None else self._add("gaussian", gaussian, ("sxy",))
        self.bilateral = (
            None if bilateral is None else self._add("bilateral", bilateral, ("sxy", "srgb"))
        )
        self.features = [
            self._add(f"features[{index}]", term, ("sigma",))
            for index, term in enumerate(check.sequence(_OP, "features", features, "dicts"))
        ]

    def _add(self, name: str, term: Any, scales: Sequence[str]) -> dict[str, Any]:
        check.kernel(_OP, name, term, (*scales, "compat"))
        compat = check.any_compatibility(_OP, f"{name}['compat']", term["compat"])
        self.register_buffer(_buffer(name), compat, persistent=False)
        return {key: check.any_scales(_OP, f"{name}[{key!r}]", term[key]) for key in scales}

    def _inference(self) -> dict[str, Any]:
        options: dict[str, Any] = {"iterations": self.iterations}
        # How kernels sum is nothing that plain torch could be told.
        return options if self.plain else options | {"precision": self.precision}

    def forward(
        self, logits: Tensor, image: Tensor | None = None, features: Sequence[Tensor] = ()
    ) -> Tensor:
        """Marginals after ``iterations`` updates; see the class for shapes."""
        arguments = self._arguments(logits, features)
        operators = self.operators
        q: Tensor = operators.dense_crf(logits, image, **arguments, **self._inference())
        return q

    def labels(
        self, logits: Tensor, image: Tensor | None = None, features: Sequence[Tensor] = ()
    ) -> Tensor:
        """The most probable label of every point, (N, *spatial) int64."""
        arguments = self._arguments(logits, features)
        labels: Tensor = self.operators.dense_crf(
            logits, image, **arguments, **self._inference(), output="labels"
        )
        return labels

    def steps(
        self, logits: Tensor, image: Tensor | None = None, features: Sequence[Tensor] = ()
    ) -> Iterator[Tensor]:
        """The marginals after 1, 2, ..., ``iterations`` updates, see ``dense_crf_steps``."""
        arguments = self._arguments(logits, features)
        steps: Iterator[Tensor] = self.operators.dense_crf_steps(
            logits, image, **arguments, **self._inference()
        )
        return steps

    def free_energy(
        self,
        q: Tensor,
        logits: Tensor,
        image: Tensor | None = None,
        features: Sequence[Tensor] = (),
    ) -> FreeEnergy:
        """The free energy of marginals, see ``dense_crf_free_energy``."""
        return dense_crf_free_energy(q, logits, image, **self._arguments(logits, features))

    def energy(
        self,
        labels: Tensor,
        logits: Tensor,
        image: Tensor | None = None,
        features: Sequence[Tensor] = (),
    ) -> Tensor:
        """The energy of a labelling, see ``dense_crf_energy``."""
        return dense_crf_energy(labels, logits, image, **self._arguments(logits, features))

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        parts = [
            f"gaussian={self._describe('gaussian', self.gaussian)}",
            f"bilateral={self._describe('bilateral', self.bilateral)}",
        ]
        if self.features:
            terms = [self._describe(f"features[{i}]", term) for i, term in enumerate(self.features)]
            parts.append(f"features=[{', '.join(terms)}]")
        parts += [
            f"{name}={getattr(self, name)!r}"
            for name in ("iterations", "normalization", "self_term", "backend")
        ]
        if self.precision != "accurate":
            parts.append(f"precision={self.precision!r}")
        return ", ".join(parts)

    def _arguments(self, logits: Tensor, features: Sequence[Tensor]) -> dict[str, Any]:
        # Which devices the operators serve, they say themselves.
        device = check.any_tensor(_OP, "logits", logits).device.type
        check.floating(_OP, "logits", logits, devices=(device,))
        tensors = check.sequence(_OP, "features", features, "tensors")
        if len(tensors) != len(self.features):
            raise ValueError(
                f"{_OP}: features must hold {len(self.features)} tensors, one per kernel of the "
                f"constructor, got {len(tensors)}"
            )
        return {
            "gaussian": self._with_compat("gaussian", self.gaussian),
            "bilateral": self._with_compat("bilateral", self.bilateral),
            "features": [
                {
                    "features": _scaled(f"features[{index}]", tensor, term["sigma"], logits),
                    "compat": getattr(self, _buffer(f"features[{index}]")),
                }
                for index, (tensor, term) in enumerate(zip(tensors, self.features, strict=True))
            ],
            "normalization": self.normalization,
            "self_term": self.self_term,
            "backend": self.backend,
        }

    def _with_compat(self, name: str, term: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if term is None else {**term, "compat": getattr(self, _buffer(name))}

    def _describe(self, name: str, term: dict[str, Any] | None) -> str:
        if term is None:
            return "None"
        compat = getattr(self, _buffer(name))
        shown = f"{compat.item():g}" if compat.dim() == 0 else f"tensor{tuple(compat.shape)}"
        return f"dict({''.join(f'{key}={_short(term[key])}, ' for key in term)}compat={shown})"


def _short(scales: float | tuple[float, ...]) -> str:
    if isinstance(scales, float):
        return f"{scales:g}"
    return f"({', '.join(f'{scale:g}' for scale in scales)})"


def _buffer(kernel: str) -> str:
    """Name of its compatibility: gaussian_compat, features_0_compat."""
    return kernel.replace("[", "_").replace("]", "") + "_compat"


def _scaled(name: str, features: Tensor, sigma: Any, logits: Tensor) -> Tensor:
    """Divided in the dtype of the computation."""
    check_features(_OP, name, features, "logits", logits)
    sigmas = check.scales(_OP, name, sigma, features.shape[1])
    dtype = check.compute_dtype(logits.dtype)
    divisor = torch.tensor(sigmas, dtype=dtype, device=features.device)
    return features.to(dtype) / divisor.view(-1, *[1] * (features.dim() - 2))
