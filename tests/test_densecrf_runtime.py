# SPDX-License-Identifier: Apache-2.0
"""Threads, processes and imports."""

from __future__ import annotations

import ast
import os
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from _bits import assert_same_bits

import pydense.densecrf as dcrf
from pydense import _core

W, H = 150, 120


def random_model(seed, labels=21):
    rng = np.random.default_rng(seed)
    image = (np.indices((H, W)).sum(axis=0)[..., None] + rng.integers(0, 40, (H, W, 3))) % 256
    crf = dcrf.DenseCRF2D(W, H, labels)
    crf.setUnaryEnergy(rng.normal(size=(labels, W * H)).astype(np.float32))
    crf.addPairwiseGaussian(3, 3)
    crf.addPairwiseBilateral(60, 10, image.astype(np.uint8), 10)
    return crf


@pytest.mark.parametrize("labels", [1, 2, 3, 5, 9, 21, 33])
@pytest.mark.parametrize("kind", ["potts", "diagonal", "matrix"])
def test_bitwise_the_same_everywhere(restore_core, labels, kind):
    rng = np.random.default_rng(labels)
    compat = {
        "potts": 3.0,
        "diagonal": rng.normal(size=labels),
        "matrix": rng.normal(size=(labels, labels)),
    }[kind]
    image = rng.integers(0, 60, (H, W, 3)).astype(np.uint8)
    unary = rng.normal(size=(labels, W * H)).astype(np.float32)
    results = {}
    for capability in _core.cpu_capabilities():
        _core.set_cpu_capability(capability)
        for threads in (1, 2, 3, 8):
            _core.set_num_threads(threads)
            crf = dcrf.DenseCRF2D(W, H, labels)
            crf.setUnaryEnergy(unary)
            crf.addPairwiseGaussian(3, compat, normalization=dcrf.NORMALIZE_AFTER)
            crf.addPairwiseBilateral(30, 20, image, compat)
            q = crf.inference(3)
            stepped, tmp1, tmp2 = crf.startInference()
            for _ in range(3):
                crf.stepInference(stepped, tmp1, tmp2)
            assert np.array_equal(q, stepped)
            results[capability, threads] = (q.tobytes(), crf.klDivergence(q))
    assert_same_bits(results)


def test_repeated_runs_are_bitwise_the_same():
    crf = random_model(0)
    first = crf.inference(5)
    assert all(np.array_equal(crf.inference(5), first) for _ in range(3))


def test_two_python_threads_with_their_own_models():
    expected = [random_model(seed).inference(4) for seed in range(4)]
    barrier = threading.Barrier(2)

    def work(seeds):
        barrier.wait()
        return [random_model(seed).inference(4) for seed in seeds]

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(work, ([0, 1], [2, 3])))
    for result, reference in zip(halves[0] + halves[1], expected, strict=True):
        assert np.array_equal(result, reference)


def test_two_python_threads_with_one_model():
    crf = random_model(1)
    expected = [crf.inference(iterations) for iterations in range(5)]
    barrier = threading.Barrier(2)

    def work(order):
        barrier.wait()
        return [crf.inference(iterations) for iterations in order]

    with ThreadPoolExecutor(2) as pool:
        up, down = pool.map(work, (range(5), range(4, -1, -1)))
    for a, b, reference in zip(up, reversed(down), expected, strict=True):
        assert np.array_equal(a, reference)
        assert np.array_equal(b, reference)


def test_python_runs_while_the_core_works():
    """The interpreter lock is released: another thread never pauses for as long as the call."""
    crf = random_model(2)
    stop, longest = threading.Event(), [0.0]

    def tick():
        last = time.perf_counter()
        while not stop.is_set():
            now = time.perf_counter()
            longest[0] = max(longest[0], now - last)
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    started = time.perf_counter()
    crf.inference(200)
    elapsed = time.perf_counter() - started
    stop.set()
    ticker.join()
    assert longest[0] < elapsed / 2


FORK = """
    import os, sys
    import numpy as np
    import pydense.densecrf as dcrf
    from pydense import _core

    def infer():
        rng = np.random.default_rng(0)
        crf = dcrf.DenseCRF2D(200, 150, 5)
        crf.setUnaryEnergy(rng.normal(size=(5, 30000)))
        crf.addPairwiseGaussian(3, 3)
        crf.addPairwiseBilateral(80, 13, rng.integers(0, 50, (150, 200, 3)).astype(np.uint8), 10)
        return crf.inference(3).tobytes()

    _core.set_num_threads(4)
    expected = infer()  # the parent's threads exist now; a forked child has none of them
    for _ in range(3):
        child = os.fork()
        if child == 0:
            same = infer() == expected
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if infer() == expected else 3)
            _, status = os.waitpid(grandchild, 0)
            os._exit((0 if same else 3) or os.waitstatus_to_exitcode(status))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        assert infer() == expected
    print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
def test_works_after_fork(run_python):
    result = run_python("-c", textwrap.dedent(FORK), timeout=20)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


def test_import_loads_no_torch(run_python):
    code = "import sys, pydense.densecrf, pydense.densecrf.utils; print(sorted(sys.modules))"
    result = run_python("-X", "importtime", "-c", code)
    assert result.returncode == 0, result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "pydense.densecrf" in loaded and "pydense._core" in loaded
    modules = loaded | set(ast.literal_eval(result.stdout))
    for heavy in ("torch", "PIL", "rich", "scipy", "skimage"):
        assert not [name for name in modules if name == heavy or name.startswith(heavy + ".")]


WITHOUT_TORCH = """
    import sys
    sys.modules["torch"] = None  # import torch: ImportError
    import numpy as np
    import pydense.densecrf as dcrf
    crf = dcrf.DenseCRF2D(8, 6, 2)
    crf.addPairwiseGaussian(3, 3)
    assert np.abs(crf.inference(2) - 0.5).max() < 1e-6
    print("ok")
"""


def test_works_without_torch_installed(run_python):
    result = run_python("-c", textwrap.dedent(WITHOUT_TORCH))
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


MEMORY = """
    import resource
    import numpy as np
    import pydense.densecrf as dcrf

    def once():
        crf = dcrf.DenseCRF2D(300, 200, 8)
        crf.addPairwiseGaussian(3, 3)
        crf.addPairwiseBilateral(80, 13, np.zeros((200, 300, 3), np.uint8), 10)
        crf.inference(1)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(5):
        once()
    before = peak()
    for _ in range(40):
        once()
    print((peak() - before) * 1024)
"""


def test_memory_is_returned(run_python):
    """Building and dropping models does not grow the process."""
    result = run_python("-c", textwrap.dedent(MEMORY))
    assert result.returncode == 0, result.stderr
    unary_bytes = 4 * 8 * 300 * 200
    assert int(result.stdout) < 5 * unary_bytes, "40 more models needed 40 times the memory"


def test_docstring_examples():
    import doctest

    assert doctest.testmod(dcrf).attempted > 10
    assert doctest.testmod(dcrf).failed == 0
