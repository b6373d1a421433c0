# SPDX-License-Identifier: Apache-2.0
"""Max pooling whose last windows may reach over the edge, as Caffe's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from pydense.ops import _crf_arguments as check


class MaxPool(nn.Module):
    """``nn.MaxPool2d`` of stride 2 that exports with dynamic sizes.

    With ``ceil_mode`` torch decides by comparing sizes whether there is a last window, which
    ``torch.export`` cannot do for sizes that it does not know. For stride 2 a row and a column of
    -inf behind the map are the same; exported programs have these.

    A map that is smaller than the window is one window, with either rounding: so pictures of any
    size have maps.

    Args:
        kernel_size: 2, or 3.
        padding: On all sides.
        ceil_mode: Caffe's rounding of the output's size.
    """

    def __init__(self, kernel_size: int, padding: int = 0, ceil_mode: bool = True) -> None:
        super().__init__()
        check.flag("MaxPool", "ceil_mode", ceil_mode)
        self.kernel_size, self.padding, self.ceil_mode = kernel_size, padding, ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """The largest value of each window."""
        x, ceil_mode = self._filled(x)
        return max_pool2d(x, self.kernel_size, 2, self.padding, ceil_mode=ceil_mode)

    def with_indices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The largest values and where in their plane they are, as ``nn.MaxUnpool2d`` takes it."""
        filled, ceil_mode = self._filled(x)
        out, where = max_pool2d(
            filled, self.kernel_size, 2, self.padding, ceil_mode=ceil_mode, return_indices=True
        )
        if filled is not x:
            columns, all_columns = x.shape[3], filled.shape[3]
            where = where // all_columns * columns + where % all_columns
        return out, where

    def _filled(self, x: Tensor) -> tuple[Tensor, bool]:
        """The map with what is missing behind it, and the rounding that is left to torch."""
        if torch.compiler.is_exporting():
            return (pad(x, (0, 1, 0, 1), value=-torch.inf), False) if self.ceil_mode else (x, False)
        least = self.kernel_size - 2 * self.padding
        below, right = (max(0, least - n) for n in x.shape[2:])
        if below or right:
            x = pad(x, (0, right, 0, below), value=-torch.inf)
        return x, self.ceil_mode

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"{self.kernel_size}, padding={self.padding}, ceil_mode={self.ceil_mode}"
