# SPDX-License-Identifier: Apache-2.0
"""The doors: loading, build information, threads, instruction sets, errors."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import pydense
from pydense import _core, _library


@pytest.fixture(autouse=True)
def _restore():
    threads, isa = _core.get_num_threads(), _core.cpu_capability()
    yield
    _core.set_num_threads(threads)
    _core.set_cpu_capability(isa)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_build_info_tells_what_is_in_use():
    info = pydense.build_info()
    assert info["version"] == pydense.__version__
    assert info["cpu_capability"] == info["cpu_capabilities"][-1] or os.environ.get(
        "PYDENSE_CPU_CAPABILITY"
    )
    assert info["torch"] == torch.__version__
    assert info["torch_library"].endswith("libpydense_torch.so")
    assert bool(info["cuda_architectures"]) == bool(info["cuda_driver_min"])


def test_selftest_passes_every_way():
    results = _library.selftest()
    assert len(results) >= len(_core.cpu_capabilities()) + 1
    assert [result for result in results if not result.ok] == []


@pytest.mark.parametrize("capability", _core.cpu_capabilities())
def test_environment_chooses_the_instruction_set(capability):
    code = "from pydense import _core; print(_core.cpu_capability())"
    done = run_python(code, PYDENSE_CPU_CAPABILITY=capability)
    assert done.stdout.strip() == capability, done.stderr


def test_unknown_instruction_set_is_refused():
    done = run_python("import pydense._core", PYDENSE_CPU_CAPABILITY="avx9")
    assert done.returncode != 0
    assert "PYDENSE_CPU_CAPABILITY must be one of " in done.stderr
    assert "got 'avx9'" in done.stderr
    with pytest.raises(ValueError, match=r"set_cpu_capability: name must be one of .*, got 'sse'"):
        _core.set_cpu_capability("sse")


def test_threads():
    pydense.set_num_threads(3)
    assert pydense.get_num_threads() == 3
    x = np.arange(1_000_000, dtype=np.float32)
    assert np.array_equal(_core.selftest(x), 2 * x + 1)
    for bad in (0, -1, 1025):
        with pytest.raises(ValueError, match=rf"set_num_threads: n must be .*, got {bad}$"):
            pydense.set_num_threads(bad)
    for bad in (2.5, "2", None):
        with pytest.raises(TypeError, match="set_num_threads: n must be an integer, got "):
            pydense.set_num_threads(bad)
    with pytest.raises(ValueError, match="set_num_threads: n must be in"):
        pydense.set_num_threads(2**70)
    done = run_python(
        "import pydense, sys; print(pydense.get_num_threads(), 'torch' in sys.modules)",
        PYDENSE_NUM_THREADS="5",
    )
    assert done.stdout.split() == ["5", "False"]
    done = run_python("import pydense; pydense.get_num_threads()", PYDENSE_NUM_THREADS="many")
    assert "PYDENSE_NUM_THREADS must be a whole number, got 'many'" in done.stderr


def test_selftest_takes_any_strides():
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for view in (x[::2, ::-1], x.transpose(2, 0, 1), x[:, :0], x[1, 2, 3]):
        assert np.array_equal(_core.selftest(np.asarray(view)), 2 * view + 1)
    with pytest.raises(TypeError):
        _core.selftest(x.astype(np.float64))


class TestTorchDoor:
    @pytest.fixture(autouse=True)
    def _load(self):
        _library.load()

    def test_value_and_layouts(self):
        x = torch.randn(4, 6, 5)
        for view in (x, x[:, ::2], x.expand(3, 4, 6, 5), x[:0], x[1, 1, 1], x.transpose(0, 2)):
            torch.testing.assert_close(
                torch.ops.pydense._selftest(view), 2 * view + 1, rtol=0, atol=0
            )

    def test_opcheck_and_compile(self):
        torch.library.opcheck(torch.ops.pydense._selftest.default, (torch.randn(7, 3),))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def doubled(x):
            return torch.ops.pydense._selftest(x) * 2

        x = torch.randn(5)
        torch.testing.assert_close(doubled(x), (2 * x + 1) * 2)

    def test_errors_are_value_errors_without_paths(self):
        with pytest.raises(ValueError) as caught:
            torch.ops.pydense._selftest(torch.zeros(3, dtype=torch.float64))
        assert str(caught.value) == "selftest: x must be of dtype Float, got Double"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
    @pytest.mark.skipif(
        not pydense.build_info()["cuda_architectures"], reason="built without CUDA kernels"
    )
    def test_cuda_kernel_without_a_gpu_is_a_clean_error(self):
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        with pytest.raises(RuntimeError, match=r"^pydense: this torch was built without CUDA$"):
            torch.ops.pydense._selftest.default.redispatch(cuda, torch.zeros(3))

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
    def test_cuda_follows_the_current_stream(self):
        x = torch.arange(1 << 20, dtype=torch.float32, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = torch.ops.pydense._selftest(x)
        stream.synchronize()
        assert torch.equal(y, 2 * x + 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = torch.ops.pydense._selftest(x)
        x.fill_(3)
        graph.replay()
        torch.cuda.synchronize()
        assert bool((z == 7).all())


def test_runs_in_a_forked_child():
    code = """
import os, numpy as np, torch
from pydense import _core, _library
_library.load()
x = np.arange(200_000, dtype=np.float32); t = torch.from_numpy(x)
_core.set_num_threads(4)
_core.selftest(x); torch.ops.pydense._selftest(t)
pid = os.fork()
if pid == 0:
    ok = np.array_equal(_core.selftest(x), 2 * x + 1)
    ok = ok and _core.get_num_threads() == 1
    y = torch.ops.pydense._selftest(t).numpy()
    os._exit(0 if ok and np.array_equal(y, 2 * x + 1) else 1)
print("child", os.waitpid(pid, 0)[1])
"""
    assert "child 0" in run_python(code).stdout


def test_missing_torch_is_explained():
    code = """
import sys
sys.modules["torch"] = None
import importlib.util
importlib.util.find_spec = lambda name, package=None: None
from pydense import _library
try:
    _library.load()
except ImportError as error:
    print(error)
"""
    assert "torch is not installed: pip install torch" in run_python(code).stdout
