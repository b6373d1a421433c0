# SPDX-License-Identifier: Apache-2.0
"""Build information and thread control; none of it imports torch."""

import importlib.util
import operator
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

from . import _core, _library

# Oldest Linux driver that runs binaries of a CUDA toolkit (NVIDIA's CUDA release notes, table of
# toolkit driver versions; within a major release, minor-version compatibility applies).
_DRIVER_MIN = {"12": "525.60.13", "13": "580.65.06"}


class BuildInfo(TypedDict):
    """What this pydense was built from and what it uses on this machine."""

    version: str
    compiler: str
    build_type: str
    cpu_capability: str
    """The instruction set the CPU kernels use now."""
    cpu_capabilities: list[str]
    """The instruction sets this machine can run, best last."""
    cuda_architectures: str
    """CUDA architectures compiled in (CMake's notation), empty without CUDA."""
    cuda_toolkit: str
    cuda_driver_min: str
    """Oldest NVIDIA driver the CUDA kernels load on; older ones need a build from source."""
    torch: str | None
    """Version of the installed torch, None without one."""
    torch_library: str
    """Where the torch operators come from, or why they cannot be loaded."""
    num_threads: int


def build_info() -> BuildInfo:
    """Versions, compiler, instruction sets, CUDA architectures, torch and threads.

    Example:
        >>> pydense.build_info()["cpu_capability"]  # doctest: +SKIP
        'avx512'
    """
    core = _core.build_info()
    try:
        torch_version = version("torch") if importlib.util.find_spec("torch") else None
    except PackageNotFoundError:
        torch_version = "unknown"
    return {
        "version": core["version"],
        "compiler": core["compiler"],
        "build_type": core["build_type"],
        "cpu_capability": _core.cpu_capability(),
        "cpu_capabilities": _core.cpu_capabilities(),
        "cuda_architectures": core["cuda_architectures"],
        "cuda_toolkit": core["cuda_toolkit"],
        "cuda_driver_min": _DRIVER_MIN.get(core["cuda_toolkit"].split(".")[0], ""),
        "torch": torch_version,
        "torch_library": _library.state(),
        "num_threads": _core.get_num_threads(),
    }


def set_num_threads(n: int) -> None:
    """Sets how many threads the NumPy functions (``pydense.densecrf``) use.

    The torch operators follow ``torch.set_num_threads`` instead. The number at start is that of
    the CPUs the process may run on, or the environment variable ``PYDENSE_NUM_THREADS``. No result
    depends on it: they are bitwise the same for any number of threads.

    Args:
        n: 1 to 1024, the calling thread included.

    Raises:
        ValueError: if n is out of range.
        TypeError: if n is no integer.
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"set_num_threads: n must be an integer, got {type(n).__name__}") from None
    _core.set_num_threads(min(max(count, -1), 2**31))  # the core refuses what is out of range


def get_num_threads() -> int:
    """The number of threads the NumPy functions use; 1 in a forked child process."""
    return _core.get_num_threads()


def empty_cache() -> None:
    """Gives the memory that is kept for the next call back to the system.

    Large results on the CPU and the kernels' own working memory are kept when they are freed and
    serve the next call: getting fresh pages from the system takes longer than what most kernels do
    with them. What is kept and in use together is never more than what was in use at a time before,
    what is kept at most a sixteenth of the machine's (not a container's) memory, from 256 MiB to
    4 GiB, for the NumPy functions and as much for the torch operators (environment variable
    ``PYDENSE_CACHE_MIB``; 0 keeps nothing), and the system may take its pages back when it runs
    short. Memory of the GPU is torch's.

    Tensors of 4 MiB and more that own such memory cannot be enlarged in place (``resize_``), as
    those of ``torch.from_numpy``; with ``PYDENSE_CACHE_MIB=0`` torch allocates them.

    Example:
        >>> pydense.empty_cache()
    """
    _core.empty_cache()
    if _library.is_loaded():
        import torch

        torch.ops.pydense._empty_cache()
