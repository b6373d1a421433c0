# SPDX-License-Identifier: Apache-2.0
"""Operators in plain torch: what pydense's own kernels are checked and measured against.

Nothing here uses a compiled part of pydense. The functions take the arguments of their namesakes in
``pydense.ops``, run on every device, and what they return has torch's own gradients. They are
written to be read, and as fast as torch's operators allow: the lattice is splatted, blurred and
sliced by ``embedding_bag``, the fastest weighted gather that torch has.
"""

from pydense.reference.aspp import aspp_concat, aspp_sum
from pydense.reference.atrous_conv import atrous_conv2d, atrous_separable_conv2d
from pydense.reference.chained_residual_pool import chained_residual_pool, max_pool2d_same
from pydense.reference.dense_crf import dense_crf, dense_crf_steps
from pydense.reference.exact import exact_gaussian_filter
from pydense.reference.permutohedral import permutohedral_filter
from pydense.reference.segmentation_head import (
    upsample_accumulate,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_softmax,
)
from pydense.reference.upsample import fuse_sum_upsample, upsample_bilinear, upsample_crop

__all__ = [
    "aspp_concat",
    "aspp_sum",
    "atrous_conv2d",
    "atrous_separable_conv2d",
    "chained_residual_pool",
    "dense_crf",
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
