# SPDX-License-Identifier: Apache-2.0
"""The dense CRF as a layer that is trained with the network in front of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pydense.ops import _crf_arguments as check

from ._operators import UsesOperators

_OP = "CRFasRNN"


class CRFasRNN(UsesOperators, nn.Module):
    r"""CRF as a recurrent network: mean field with trained kernel weights and compatibility.

    From the logits z, ``iterations`` times :math:`z_t = z + \mu \sum_k W_k (\hat K_k\,
    \mathrm{softmax}(z_{t-1}))` with a spatial kernel on (x, y) / ``spatial_sxy`` and a bilateral
    one on (x, y) / ``bilateral_sxy``, RGB / ``bilateral_srgb``, each normalised to a weighted mean.
    **Positive attracts** here: :math:`\mu` starts as the unit matrix, and W as a multiple of it.

    Trained are the kernel weights ``spatial_ker_weights`` and ``bilateral_ker_weights``, the
    ``compatibility_matrix`` (L, L) and, on request, the bandwidths. Names, shapes and defaults are
    those of the published PyTorch port, whose checkpoints load; ``forward`` takes the logits first.

    Args:
        num_labels: L.
        iterations: Number of mean-field updates: 5 in training, 10 afterwards in the paper. An
            attribute, which may be set later.
        kernel_weights: ``"matrix"`` (L, L), ``"label"`` (L,) or ``"scalar"`` () for each kernel.
        spatial_weight: What the spatial kernel's weights start from.
        bilateral_weight: The same for the bilateral one.
        spatial_sxy: Standard deviation in pixels (theta_gamma).
        bilateral_sxy: Standard deviation in pixels (theta_alpha).
        bilateral_srgb: Standard deviation in units of the image, usually 0..255 (theta_beta).
        train_bandwidths: Make the logarithms of the three standard deviations parameters
            (``log_spatial_sxy``, ``log_bilateral_sxy``, ``log_bilateral_srgb``). Their gradient
            costs many times the rest of the step, see ``feature_gradient`` of ``dense_crf``.
        normalization: ``"after"``, ``"before"``, ``"symmetric"`` or None.
        self_term: Whether a point's own marginals are part of its messages.
        backend: ``"lattice"`` or ``"exact"``.
        recompute: Run the iterations again in backward instead of keeping their marginals.
        precision: ``"accurate"`` or, with ``backend="exact"`` on a GPU, ``"fast"``.

    Shape:
        - logits: (N, L, H, W) or (N, L, D, H, W), any strides.
        - image: (N or 1, channels, *spatial); a gradient reaches it where it requires one.
        - output: the logits z_T, like ``logits`` in shape, dtype and memory format. Computed in
          float32 (float64 for float64), under autocast too.

    Raises:
        ValueError: In the constructor or the call, see :func:`pydense.ops.dense_crf`.
        TypeError: In the constructor or the call, see :func:`pydense.ops.dense_crf`.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (cuda).

    Memory for backward: that of ``dense_crf``: ``iterations`` marginals, or none of them with
    ``recompute``.

    Source: S. Zheng et al., *Conditional Random Fields as Recurrent Neural Networks*, ICCV 2015;
    parameters as in sadeepj/crfasrnn_pytorch.

    Example:
        >>> import torch
        >>> from pydense.nn import CRFasRNN
        >>> crf = CRFasRNN(21)
        >>> logits, image = torch.randn(2, 21, 60, 80), torch.randint(256, (2, 3, 60, 80))
        >>> refined = crf(logits, image)
        >>> torch.nn.functional.cross_entropy(refined, torch.randint(21, (2, 60, 80))).backward()
        >>> crf.compatibility_matrix.grad.shape
        torch.Size([21, 21])
    """

    def __init__(
        self,
        num_labels: int,
        iterations: int = 5,
        *,
        kernel_weights: str = "matrix",
        spatial_weight: float = 3.0,
        bilateral_weight: float = 5.0,
        spatial_sxy: float = 3.0,
        bilateral_sxy: float = 160.0,
        bilateral_srgb: float = 3.0,
        train_bandwidths: bool = False,
        normalization: str | None = "after",
        self_term: bool = True,
        backend: str = "lattice",
        recompute: bool = False,
        precision: str = "accurate",
    ) -> None:
        super().__init__()
        self.num_labels = check.integer(_OP, "num_labels", num_labels, 1, check.MAX_LABELS)
        self.iterations = check.integer(_OP, "iterations", iterations, 0, check.MAX_ITERATIONS)
        check.choice(_OP, "kernel_weights", kernel_weights, ("matrix", "label", "scalar"))
        check.choice(_OP, "normalization", normalization, check.NORMALIZATIONS)
        check.backend(_OP, backend, precision)
        check.flag(_OP, "self_term", self_term)
        check.flag(_OP, "train_bandwidths", train_bandwidths)
        check.flag(_OP, "recompute", recompute)
        self.normalization = normalization
        self.self_term = self_term
        self.backend = backend
        self.recompute = recompute
        self.precision = precision
        one = {
            "matrix": torch.eye(self.num_labels),
            "label": torch.ones(self.num_labels),
            "scalar": torch.tensor(1.0),
        }[kernel_weights]
        self.spatial_ker_weights = nn.Parameter(one * _number("spatial_weight", spatial_weight))
        self.bilateral_ker_weights = nn.Parameter(
            one * _number("bilateral_weight", bilateral_weight)
        )
        self.compatibility_matrix = nn.Parameter(torch.eye(self.num_labels))
        self.train_bandwidths = train_bandwidths
        self._bandwidths = {
            name: check.scales(_OP, name, value, 1)[0]
            for name, value in (
                ("spatial_sxy", spatial_sxy),
                ("bilateral_sxy", bilateral_sxy),
                ("bilateral_srgb", bilateral_srgb),
            )
        }
        if train_bandwidths:
            for name, value in self._bandwidths.items():
                self.register_parameter(f"log_{name}", nn.Parameter(torch.tensor(value).log()))

    def forward(self, logits: Tensor, image: Tensor) -> Tensor:
        """The refined logits; see the class for shapes."""
        device = check.any_tensor(_OP, "logits", logits).device.type
        check.floating(_OP, "logits", logits, (4, 5), (device,))
        if logits.shape[1] != self.num_labels:
            raise ValueError(
                f"{_OP}: logits must have {self.num_labels} labels, got shape {check.shape(logits)}"
            )
        dtype = check.compute_dtype(logits.dtype)
        # Autocast would make the products of these small matrices in 16 bits.
        with torch.autocast(logits.device.type, enabled=False):
            compatibility = self.compatibility_matrix.to(dtype)
            spatial, bilateral = (
                compatibility @ weights.to(dtype)
                if weights.dim() == 2
                else compatibility * weights.to(dtype)  # of a label: its column
                for weights in (self.spatial_ker_weights, self.bilateral_ker_weights)
            )
            place, far, shade = (self.bandwidth(name) for name in self._bandwidths)
            # What is kept for backward, and how kernels sum, plain torch cannot be told.
            own = {"recompute": self.recompute, "precision": self.precision}
            refined: Tensor = self.operators.dense_crf(
                logits,
                image,
                gaussian={"sxy": place, "compat": spatial},
                bilateral={"sxy": far, "srgb": shade, "compat": bilateral},
                iterations=self.iterations,
                normalization=self.normalization,
                self_term=self.self_term,
                backend=self.backend,
                output="logits",
                **({} if self.plain else own),
            )
            return refined

    def bandwidth(self, name: str) -> float | Tensor:
        """A standard deviation, by its name in the constructor; a tensor where it is trained."""
        if not self.train_bandwidths:
            return self._bandwidths[name]
        logarithm: Tensor = getattr(self, f"log_{name}")
        return logarithm.exp()

    def extra_repr(self) -> str:
        """The arguments of the constructor that are not parameters."""
        parts: list[Any] = [str(self.num_labels)]
        names = ("iterations", "train_bandwidths", "normalization", "self_term", "backend")
        parts += [f"{name}={getattr(self, name)!r}" for name in (*names, "recompute", "precision")]
        with torch.no_grad():
            parts += [f"{name}={float(self.bandwidth(name)):g}" for name in self._bandwidths]
        return ", ".join(parts)


def _number(name: str, value: Any) -> Tensor:
    weight = check.any_compatibility(_OP, name, value)
    if weight.dim() > 0:
        raise ValueError(f"{_OP}: {name} must be a number, got shape {check.shape(weight)}")
    return weight
