# SPDX-License-Identifier: Apache-2.0
"""Those of ``_cuda_cases`` that belong to the dense CRF."""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks._cuda_calls import Calls

CRF_BUILD = "1x5x321x481, bilateral 80, 13"
CRF_KEYS = "1x9x321x481, keys of two words"
CRF_FIELD = "1x21x321x481, bilateral 80, 13, 1 iteration"
CRF_POTTS = f"{CRF_FIELD} and back"
CRF_MATRIX = "1x21x321x481, bilateral 80, 13, matrix, 1 iteration and back"
CRF_FEATURES = "1x21x321x481, bilateral 80, 13, features of 1 iteration"
CRF_CHECK = "1x21x321x481, bilateral 80, 13, the lattice's own derivative"
EXACT_FAST = "1x21x321x481, bilateral 80, 13, 29 % of pairs"
EXACT_TWIN = f"{EXACT_FAST}, sm_90a"


def _crf_features() -> Tensor:
    """Of a picture with smooth colours and some noise, as the counted launch has."""
    y, x = torch.meshgrid(torch.arange(321.0), torch.arange(481.0), indexing="ij")
    noise = torch.rand(3, 321, 481, generator=torch.Generator().manual_seed(8))
    colours = [100 + 40 * torch.sin(0.05 * (x + c * y)) + 12 * noise[c] - 6 for c in range(3)]
    return torch.stack([x / 80, y / 80, *(c / 13 for c in colours)])[None].cuda()


def _crf_lattice(wide: bool = False) -> Calls:
    from pydense.ops import permutohedral_filter  # noqa: F401  (loads the operators)

    features = _crf_features()
    if wide:
        features = torch.cat([features, 40 * features[:, :4]], 1)
    return Calls(lambda: torch.ops.pydense.dense_crf_lattice(features, "symmetric", True))


def _crf_field() -> Calls:
    from pydense.ops import permutohedral_filter  # noqa: F401

    op = torch.ops.pydense
    lattice = op.dense_crf_lattice(_crf_features(), "symmetric", True)
    unary = torch.randn(1, 21, 321, 481, device="cuda")
    compat = torch.tensor(10.0, device="cuda")
    arguments = (unary, [lattice], [compat], 1, False, None, "probabilities")
    return Calls(lambda: op.dense_crf_mean_field(*arguments))


def _crf_training(matrix: bool = False) -> Calls:
    """Forward for training and backward, of the operators alone."""
    from pydense.ops import permutohedral_filter  # noqa: F401

    op = torch.ops.pydense
    lattice = op.dense_crf_lattice(_crf_features(), "symmetric", True)
    unary = torch.randn(1, 21, 321, 481, device="cuda")
    compat = torch.rand(21, 21, device="cuda") if matrix else torch.tensor(10.0, device="cuda")
    none = torch.empty(0, device="cuda")

    def run() -> None:
        result, kept = op.dense_crf_mean_field_training(
            unary, [lattice], [compat], [none], 1, False, None, "probabilities", "filter", False
        )
        op.dense_crf_mean_field_backward(
            unary, None, result, kept, [lattice], [compat], 1, False, None, False, False, False
        )

    return Calls(run)


def _crf_feature_gradient(mode: str = "filter") -> Calls:
    from pydense.ops import permutohedral_filter  # noqa: F401

    op = torch.ops.pydense
    features = _crf_features()
    lattice = op.dense_crf_lattice(features, "symmetric", True)
    rows = torch.randn(2, 1, 321, 481, 21, device="cuda").movedim(4, 2)
    return Calls(
        lambda: op.dense_crf_feature_gradient(features, lattice, rows[0], rows[1], None, mode)
    )


def _exact(
    height: int, width: int, dims: int, fast: bool = False, twin: bool = False
) -> Callable[[], Calls]:
    """``twin``: with the kernel that only a switch chooses, as it does on cards that have it."""

    def make() -> Calls:
        from pydense.ops import exact_gaussian_filter  # noqa: F401

        op = torch.ops.pydense
        features = _crf_features()[:, -dims:, :height, :width].flatten(2).contiguous()
        values = torch.rand(1, 21, height * width, device="cuda")
        if not fast:
            return Calls(lambda: op.exact_gaussian_filter(values, features, True))

        def both() -> Tensor:
            order = op.exact_gaussian_order(features)
            with patch.dict(os.environ, {"PYDENSE_EXPERIMENTAL_KERNELS": "1" if twin else "0"}):
                result: Tensor = op.exact_gaussian_filter_fast(values, features, order, True, 1e-4)
            return result

        return Calls(both)

    return make


def _each(shape: str, case: Callable[[], Calls], *kernels: str) -> dict[str, Callable[[], Calls]]:
    return {f"{kernel}_kernel|{shape}": case for kernel in kernels}


_FILTER = ("lattice_blur", "lattice_splat", "lattice_splat_long")
_TRAINING = (
    *_FILTER,
    "label_chunk_sum",
    "mean_field_gradient",
    "mean_field_update",
    "rows_load",
    "rows_store",
)
_EMBED = ("lattice_bounds", "lattice_embed", "lattice_heads", "lattice_plan")

CRF_CASES: dict[str, Callable[[], Calls]] = {
    **_each(
        CRF_BUILD,
        _crf_lattice,
        *_FILTER,
        *_EMBED,
        "lattice_chunk",
        "lattice_link",
        "lattice_norm",
        "lattice_number",
    ),
    **_each(CRF_KEYS, lambda: _crf_lattice(wide=True), *_EMBED, "lattice_gather_keys"),
    **_each(CRF_FIELD, _crf_field, *_FILTER, "mean_field_update", "rows_load", "rows_store"),
    **_each(CRF_POTTS, _crf_training, *_TRAINING, "label_scale"),
    **_each(
        CRF_MATRIX, lambda: _crf_training(matrix=True), *_TRAINING, "label_outer", "label_product"
    ),
    **_each(
        CRF_FEATURES,
        _crf_feature_gradient,
        *_FILTER,
        "feature_difference",
        "feature_load",
        "feature_norm",
        "feature_store",
    ),
    **_each(
        CRF_CHECK,
        lambda: _crf_feature_gradient("lattice"),
        *_FILTER,
        "feature_corner",
        "feature_load",
        "feature_norm",
        "feature_simplex",
    ),
    "exact_filter_kernel|1x21x321x481, 5 features": _exact(321, 481, 5),
    "exact_filter_kernel|1x21x321x481, 2 features": _exact(321, 481, 2),
    "exact_sum_kernel|1x21x64x64, 5 features, 32 parts": _exact(64, 64, 5),
    "exact_sum_kernel|1x21x64x64, 2 features, 32 parts": _exact(64, 64, 2),
    "exact_sum_kernel|1x21x64x64, 8 parts": _exact(64, 64, 5, fast=True),
    "exact_sum_kernel|1x21x64x64, 8 parts, sm_90a": _exact(64, 64, 5, fast=True, twin=True),
    **_each(EXACT_TWIN, _exact(321, 481, 5, fast=True, twin=True), "exact_wgmma", "fast_pack"),
    **_each(
        EXACT_FAST,
        _exact(321, 481, 5, fast=True),
        "exact_fast",
        "fast_pack",
        "order_begin",
        "order_finish",
        "order_keys",
        "order_sides",
    ),
}
