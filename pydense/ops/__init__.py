# SPDX-License-Identifier: Apache-2.0
"""Functions on torch tensors, over pydense's own operators.

Importing this registers ``torch.ops.pydense`` with everything ``torch.compile`` and
``torch.export`` need; a program that loads an exported graph imports it too.
"""

from ._crf_energy import FreeEnergy, dense_crf_energy, dense_crf_free_energy
from ._cross_entropy_head import CrossEntropy, upsample_cross_entropy
from ._exact import exact_gaussian_filter
from ._lattice_cache import clear_lattice_cache
from .aspp import aspp_sum
from .aspp_concat import aspp_concat
from .atrous_conv import atrous_conv2d
from .atrous_separable_conv import atrous_separable_conv2d
from .chained_residual_pool import chained_residual_pool, max_pool2d_same
from .coord_map import coordinate_map, crop_offset
from .dense_crf import dense_crf, dense_crf_steps
from .permutohedral import permutohedral_filter
from .segmentation_head import (
    Prediction,
    upsample_accumulate,
    upsample_argmax,
    upsample_softmax,
)
from .upsample import bilinear_filler, fuse_sum_upsample, upsample_bilinear, upsample_crop

__all__ = [
    "CrossEntropy",
    "FreeEnergy",
    "Prediction",
    "aspp_concat",
    "aspp_sum",
    "atrous_conv2d",
    "atrous_separable_conv2d",
    "bilinear_filler",
    "chained_residual_pool",
    "clear_lattice_cache",
    "coordinate_map",
    "crop_offset",
    "dense_crf",
    "dense_crf_energy",
    "dense_crf_free_energy",
    "dense_crf_steps",
    "exact_gaussian_filter",
    "fuse_sum_upsample",
    "max_pool2d_same",
    "permutohedral_filter",
    "upsample_accumulate",
    "upsample_argmax",
    "upsample_bilinear",
    "upsample_crop",
    "upsample_cross_entropy",
    "upsample_softmax",
]
