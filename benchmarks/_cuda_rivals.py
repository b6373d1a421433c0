# SPDX-License-Identifier: Apache-2.0
"""What atrous convolutions should take on an H200 where no counts of the shim say it.

Estimates, none of them measured: for cuDNN, and for kernels that the shim cannot run. A convolution
of cuDNN takes the longest of three times, as if nothing else took any, and a launch:

- its products, with all taps (nothing says that cuDNN leaves out those beside the map) and outputs
  in tiles of 64, at 65 % of 790 TFLOP/s in 16 bits, half of that in TF32;
- reading the map once for each tap and 256 outputs, at 5.5 TB/s of the second-level cache;
- map, weights and result once at 85 % of the data sheet's memory bandwidth.

A depthwise one is bound by memory, whatever the caches give its taps: a lower limit. The twin of
the dense kernel for sm_90a is taken to multiply as well as cuDNN, the taps on the map alone, on all
multiprocessors, which 72 tiles of DeepLab v3's pyramid do not fill: a lower limit, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks._cuda_counts import BANDWIDTH, LAUNCH_SECONDS

PRODUCTS = {2: 0.65 * 790e12, 4: 0.65 * 395e12}  # by bytes of an element
CACHE = 5.5e12
TILE_OUTPUTS = 64
MOST_OUTPUTS = 256


class Branch(NamedTuple):
    """A convolution among those of a map."""

    outputs: int
    kernel: int
    rate: int


V2_HEAD = tuple(Branch(21, 3, rate) for rate in (6, 12, 18, 24))
PYRAMID = (Branch(256, 1, 1), *(Branch(256, 3, rate) for rate in (6, 12, 18)))
LARGE_FOV = (Branch(1024, 3, 12),)
SINGLE = (Branch(256, 3, 12),)
POINT = (Branch(256, 1, 1),)

PYRAMID_NAME = "1 x 2048 x 33 x 33 to 256 1x1 and 3 x 256 with rates 6, 12, 18, bfloat16"
LARGE_FOV_NAME = "1 x 512 x 41 x 41 to 1024, rate 12"
CONTIGUOUS_NAME = "1 x 2048 x 33 x 33 to 256, rate 12, float16, contiguous"
GRADIENT_NAME = "1 x 2048 x 33 x 33 by 256, rate 12, bfloat16, channels_last"
DATA_GRADIENT_NAME = "data gradient of 1 x 2048 x 33 x 33 to 256, rate 12, bfloat16, channels_last"
BRANCH_NAME = "1 x 2048 x 65 x 65, rate 12"
SEPARABLE_NAME = "2048 x 65 x 65 to 256, rate 12"
TAPS_NAME = "1 x 21 x 65 x 65, 33 taps"


def dense(size: int, channels: int, branches: Sequence[Branch], width: int) -> float:
    """Seconds for the convolutions of a map of (channels, size, size), their results joined.

    Args:
        size: Rows and columns.
        channels: Of the map.
        branches: One launch each.
        width: Bytes of an element.
    """
    pixels = size * size
    seconds = 0.0
    for branch in branches:
        taps = branch.kernel**2
        tiled = -(-branch.outputs // TILE_OUTPUTS) * TILE_OUTPUTS
        passes = -(-branch.outputs // MOST_OUTPUTS)
        moved = channels * pixels + branch.outputs * (pixels + channels * taps)
        seconds += LAUNCH_SECONDS + max(
            2 * taps * channels * tiled * pixels / PRODUCTS[width],
            taps * passes * channels * pixels * width / CACHE,
            moved * width / BANDWIDTH,
        )
    if len(branches) > 1:
        seconds += joined(pixels * sum(branch.outputs for branch in branches), width)
    return seconds


def joined(elements: int, width: int) -> float:
    """Seconds to read the results of branches and write them side by side, or their sum."""
    return LAUNCH_SECONDS + 2 * elements * width / BANDWIDTH


def depthwise(size: int, channels: int, width: int) -> float:
    """Seconds for a depthwise convolution, or for the gradient of its weight."""
    return LAUNCH_SECONDS + 2 * channels * size * size * width / BANDWIDTH


def head_gradients(size: int, channels: int, branches: Sequence[Branch], width: int) -> float:
    """Seconds for the forward pass and all gradients of convolutions that are summed.

    The gradient of a weight has the products of the forward pass and reads the map as often; that
    of the map reads the outputs' gradient. Those of the map are summed, too.
    """
    of_map = sum(dense(size, b.outputs, (b._replace(outputs=channels),), width) for b in branches)
    sums = (len(branches) - 1) * joined(channels * size * size, width)
    return 2 * dense(size, channels, branches, width) + of_map + sums


def _separable(size: int, channels: int, width: int) -> float:
    return depthwise(size, channels, width) + dense(size, channels, POINT, width)


def share_on_map(size: int, branches: Sequence[Branch]) -> float:
    """Of the products of all taps, those of taps that lie on a map of (size, size)."""
    every = meant = 0
    for outputs, kernel, rate in branches:
        reach = kernel // 2
        rows = sum(max(0, size - rate * abs(tap)) for tap in range(-reach, reach + 1))
        meant += outputs * rows**2
        every += outputs * (kernel * size) ** 2
    return meant / every


def _twin(size: int, channels: int, branches: Sequence[Branch]) -> float:
    every = sum(2 * b.kernel**2 * channels * b.outputs * size**2 for b in branches)
    return LAUNCH_SECONDS + share_on_map(size, branches) * every / PRODUCTS[2]


# Seconds of the kernels that the shim cannot run, by "kernel|shape".
TWINS: dict[str, float] = {
    f"dense_wgmma_kernel|{PYRAMID_NAME}, channels_last": _twin(33, 2048, PYRAMID),
    f"dense_wgmma_kernel|{LARGE_FOV_NAME}, bfloat16, channels_last": _twin(41, 512, LARGE_FOV),
    f"dense_wgmma_kernel|{DATA_GRADIENT_NAME}": _twin(33, 256, (Branch(2048, 3, 12),)),
}

# Seconds of the whole call, by "kernel|shape".
CUDNN: dict[str, float] = {
    f"dense_mma_kernel|{PYRAMID_NAME}, channels_last": dense(33, 2048, PYRAMID, 2),
    f"dense_mma_kernel|{LARGE_FOV_NAME}, bfloat16, channels_last": dense(41, 512, LARGE_FOV, 2),
    f"dense_mma_kernel|{LARGE_FOV_NAME}, TF32, channels_last": dense(41, 512, LARGE_FOV, 4),
    "dense_mma_kernel|1 x 2048 x 4 x 4 to 256, 1x1, bfloat16, channels_last": dense(
        4, 2048, POINT, 2
    ),
    f"dense_mma_kernel|{CONTIGUOUS_NAME}": dense(33, 2048, SINGLE, 2),
    f"dense_wgmma_kernel|{PYRAMID_NAME}, channels_last": dense(33, 2048, PYRAMID, 2),
    f"dense_wgmma_kernel|{LARGE_FOV_NAME}, bfloat16, channels_last": dense(41, 512, LARGE_FOV, 2),
    f"dense_wgmma_kernel|{DATA_GRADIENT_NAME}": dense(33, 256, (Branch(2048, 3, 12),), 2),
    f"dense_gradient_mma_kernel|{GRADIENT_NAME}": dense(33, 2048, SINGLE, 2),
    f"separable_mma_kernel|1 x {SEPARABLE_NAME}, bfloat16": _separable(65, 2048, 2),
    f"separable_mma_kernel|1 x {SEPARABLE_NAME}, bfloat16, channels_last": _separable(65, 2048, 2),
    f"separable_mma_kernel|1 x {SEPARABLE_NAME}, TF32, channels_last": _separable(65, 2048, 4),
    "separable_mma_kernel|1 x 304 x 129 x 129 to 256, rate 1, bfloat16, channels_last": _separable(
        129, 304, 2
    ),
    f"depthwise_last_kernel|{BRANCH_NAME}, bfloat16, channels_last": depthwise(65, 2048, 2),
    f"depthwise_gradient_kernel|{BRANCH_NAME}, bfloat16, channels_last": depthwise(65, 2048, 2),
    f"tap_add_kernel|{TAPS_NAME}, bfloat16, channels_last": dense(65, 2048, V2_HEAD, 2),
    f"tap_gather_kernel|{TAPS_NAME}, bfloat16, channels_last": head_gradients(65, 2048, V2_HEAD, 2),
}
for _name, _width in (("bfloat16", 2), ("float32", 4)):
    CUDNN |= {
        f"depthwise_kernel|{BRANCH_NAME}, {_name}": depthwise(65, 2048, _width),
        f"depthwise_gradient_kernel|{BRANCH_NAME}, {_name}": depthwise(65, 2048, _width),
        f"tap_add_kernel|{TAPS_NAME}, {_name}": dense(65, 2048, V2_HEAD, _width),
        f"tap_gather_kernel|{TAPS_NAME}, {_name}": head_gradients(65, 2048, V2_HEAD, _width),
    }
