# SPDX-License-Identifier: Apache-2.0
"""Functions for which torch has no bfloat16 or float16 kernels on the CPU.

Tensors of these dtypes are computed in float32, on every device, and rounded once. Autograd keeps
the float32 copy for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def local_response_norm(x: Tensor) -> Tensor:
    """Local response normalisation across channels, with the constants of AlexNet.

    ``y[c] = x[c] / (1 + 1e-4 / 5 * sum of x[i]^2 for i = c-2 ... c+2)^0.75``, channels beyond the
    ends being zero; k = 1 as in Caffe's layer, where the paper has 2 (Krizhevsky et al., "ImageNet
    Classification with Deep Convolutional Neural Networks", 2012, section 3.3).

    Args:
        x: (N, C, H, W), of any floating dtype.

    Returns:
        Of x's shape and dtype.
    """
    made = functional.local_response_norm(_wide(x), 5, alpha=1e-4, beta=0.75, k=1.0)
    return made.to(x.dtype)


def bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic upsampling with the kernel of MATLAB's ``imresize`` (a = -1/2), half-pixel centres.

    Torch has that kernel with ``antialias=True``, which filters nothing of a map that grows.

    Args:
        x: (N, C, H, W), of any floating dtype.
        size: Rows and columns of the result, at least those of x.

    Returns:
        (N, C, *size), of x's dtype.
    """
    return functional.interpolate(_wide(x), size, mode="bicubic", antialias=True).to(x.dtype)
