# SPDX-License-Identifier: Apache-2.0
"""The NumPy door: the torch-free kernel core, bound with pybind11."""

from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    cuda_architectures: str  # "" when built without CUDA
    cuda_toolkit: str  # "" when built without CUDA

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def set_cpu_capability(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def empty_cache() -> None: ...
def cached_bytes() -> int: ...
def selftest(x: NDArray[np.float32]) -> NDArray[np.float32]: ...

class Lattice:
    """Permutohedral lattice of N points; features is float32 (d, N) of any strides."""

    def __init__(
        self,
        features: NDArray[np.float32],
        normalization: Literal["none", "before", "after", "symmetric"] = "none",
        width: int = 0,
    ) -> None:
        """width: of the picture the points are, row by row; 0 for points without an order."""
    @property
    def num_points(self) -> int: ...
    @property
    def num_dims(self) -> int: ...
    @property
    def num_vertices(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def filter(self, values: NDArray[np.float32], *, reverse: bool = False) -> NDArray[np.float32]:
        """(C, N) -> (C, N): splat, blur, slice, normalised. ``reverse`` gives the transpose."""

class MeanField:
    """Mean-field inference; every (L, N) array is float32 with any strides."""

    def __init__(self, num_points: int, num_labels: int, width: int = 0) -> None: ...
    def set_unary(self, unary: NDArray[np.float32]) -> None: ...
    def add_pairwise(self, lattice: Lattice, compat: NDArray[np.float32]) -> None:
        """Adds a kernel; compat () for Potts, (L,) or (L, L): positive values attract."""

    def start(self) -> NDArray[np.float32]:
        """softmax(-unary), a new (L, N) array in label-fastest memory order."""
    def step(self, q: NDArray[np.float32]) -> None:
        """One mean-field update of q, in place."""
    def run(self, iterations: int) -> NDArray[np.float32]:
        """start() and then ``iterations`` updates, fused."""
    def kl_divergence(self, q: NDArray[np.float32]) -> float: ...
