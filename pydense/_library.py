# SPDX-License-Identifier: Apache-2.0
"""Loads the torch operators (once) and tests that every way into the kernels works."""

import importlib.util
import re
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_FILE = Path(__file__).parent / "libpydense_torch.so"
_TORCH_MIN = (2, 11)
_lock = threading.Lock()
_loaded = False


def _obstacle() -> str | None:
    """Why the torch operators cannot be loaded here, None where they can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    if not _FILE.exists():
        return f"{_FILE.name} is missing: reinstall pydense (pip install --force-reinstall pydense)"
    try:
        found = version("torch")
    except PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and (int(numbers[1]), int(numbers[2])) < _TORCH_MIN:
        return f"pydense needs torch >= {_TORCH_MIN[0]}.{_TORCH_MIN[1]}, found {found}"
    return None


def state() -> str:
    """Path of the operator library, or why it cannot be loaded. Does not import torch."""
    return _obstacle() or str(_FILE)


def load() -> None:
    """Registers ``torch.ops.pydense``.

    Raises:
        ImportError: with the reason and what to do, where torch or the library is missing.
    """
    global _loaded
    with _lock:
        if _loaded:
            return
        if reason := _obstacle():
            raise ImportError(f"pydense: {reason}")
        import torch

        from . import _core

        torch.ops.load_library(_FILE)  # type: ignore[no-untyped-call]
        found, expected = torch.ops.pydense._version(), _core.build_info()["version"]
        if found != expected:
            raise ImportError(
                f"pydense: {_FILE.name} is of version {found}, the rest of {expected}: "
                "reinstall pydense (pip install --force-reinstall pydense)"
            )
        torch.library.register_fake("pydense::_selftest")(_fake_selftest)
        _loaded = True


def is_loaded() -> bool:
    """Whether ``torch.ops.pydense`` is there."""
    return _loaded


def _fake_selftest(x: "torch.Tensor") -> "torch.Tensor":
    return x.new_empty(x.shape)


class SelftestResult(NamedTuple):
    """One line of ``pydense info --selftest``."""

    name: str
    ok: bool
    detail: str


def selftest() -> list[SelftestResult]:
    """Runs the smallest real kernel every way a kernel can be reached.

    On the NumPy door once per instruction set of this machine; on the torch door on the CPU and,
    where torch sees a GPU, on the current CUDA stream. Ways that do not exist here are left out
    or, for a missing torch, reported as not tested.
    """
    return [*_selftest_numpy(), *_selftest_torch()]


def _selftest_numpy() -> list[SelftestResult]:
    import numpy as np

    from . import _core

    x = np.arange(100_003, dtype=np.float32)
    before = _core.cpu_capability()
    results = []
    try:
        for name in _core.cpu_capabilities():
            _core.set_cpu_capability(name)
            ok = bool(np.array_equal(_core.selftest(x), 2 * x + 1))
            results.append(SelftestResult(f"numpy, {name}", ok, "exact" if ok else "wrong result"))
    finally:
        _core.set_cpu_capability(before)
    return results


def _selftest_torch() -> list[SelftestResult]:
    if reason := _obstacle():
        return [SelftestResult("torch", True, f"not tested: {reason}")]
    import torch

    try:
        load()
    except (ImportError, OSError) as error:
        return [SelftestResult("torch", False, str(error))]
    from . import _core

    results = [_selftest_device(torch.device("cpu"))]
    cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if cards and not _core.build_info()["cuda_architectures"]:
        return [*results, SelftestResult("torch, cuda", True, "not tested: built without CUDA")]
    return results + [_selftest_device(card) for card in cards]


def _selftest_device(device: "torch.device") -> SelftestResult:
    import torch

    name = f"torch {torch.__version__}, {device}"
    try:
        x = torch.arange(100_003, dtype=torch.float32, device=device)
        ok = torch.equal(torch.ops.pydense._selftest(x), 2 * x + 1)
    except RuntimeError as error:
        return SelftestResult(name, False, str(error).splitlines()[0])
    return SelftestResult(name, ok, "exact" if ok else "wrong result")
