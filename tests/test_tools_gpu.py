# SPDX-License-Identifier: Apache-2.0
"""tools/verify_gpu.sh without a GPU: its steps, with programs that play their parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_tools import load

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "summary.md",
    "verify.json",
    "kernels.json",
    "build.log",
    "tests.log",
    "sanitizer.log",
}
# Plays Python on a machine with a GPU; the summary is the real one.
PYTHON = """#!/bin/bash
case "$*" in
  -c*) echo 90a-real ;;
  *setup.py*) echo "archs $PYDENSE_CUDA_ARCHS"; exit {build} ;;
  *--measure-twins* | *"pytest tests/test_ops"*) exit 1 ;;
  *--measure-compiled*)
    whole='{{"o": {{"call": 1e-6, "rival": 3e-6, "compiled": {{"error": "why"}}}}}}'
    sed -i -e 's/"call": 4e-6/"compiled": {{"call": 2e-6, "rival": 6e-6}}, &/' \\
      -e "s/\\"kernels\\"/\\"operators\\": $whole, &/" "${{@: -1}}" ;;
  *benchmarks.cuda_kernels*)
    echo '{{"card": "NVIDIA H200", "commit": "abc", "kernels": {{"k|n":
           {{"seconds": 2e-6, "predicted": 1e-6, "call": 4e-6, "rival": 1e-5}}}}}}' \\
      > "${{@: -1}}" ;;
  *pytest*--junitxml=*)
    report="${{@: -1}}"
    echo '<testsuites><testsuite><testcase classname="a" name="ok"/>' >"${{report#*=}}"
    echo '{more}</testsuite></testsuites>' >>"${{report#*=}}"
    exit {tests} ;;
  *gpu_summary*) exec {real} "$@" ;;
  *) exit 0 ;;
esac
"""
SANITIZER = """#!/bin/bash
case "$2" in
  memcheck) echo "========= ERROR SUMMARY: 0 errors" ;;
  racecheck) echo "========= Error: Device not supported"; exit 1 ;;
  initcheck) echo "========= ERROR SUMMARY: 3 errors"; exit 86 ;;
  *) exit 127 ;;
esac
"""


@pytest.fixture
def verify(tmp_path):
    """Runs the script with the played programs first on PATH."""

    def run(*arguments: str, build: int = 0, tests: int = 0, more: str = ""):
        python, sanitizer = tmp_path / "python3", tmp_path / "compute-sanitizer"
        python.write_text(PYTHON.format(build=build, tests=tests, more=more, real=sys.executable))
        sanitizer.write_text(SANITIZER)
        for program in (python, sanitizer):
            program.chmod(0o755)
        out = tmp_path / "out"
        done = subprocess.run(
            ["bash", str(ROOT / "tools" / "verify_gpu.sh"), *arguments, str(out)],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, out

    return run


def test_everything_passes(verify):
    done, out = verify()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == FILES
    page = (out / "summary.md").read_text()
    assert "# pydense on NVIDIA H200" in page
    assert "| `k` | n | 2.0 us | 1.0 us | 2.00 | 2.50x | 3.00x |" in page
    assert "| o | 1.0 us | 3.00x | why |" in page
    assert "| twin-tests | 1 |" in page  # what has never run may fail
    assert "| memcheck | nothing found |" in page
    assert "| racecheck | did not start on this machine |" in page
    assert "| initcheck | 3 errors |" in page
    assert "| synccheck | did not start on this machine |" in page
    assert "1 passed, 0 failed, 0 skipped" in page
    assert "archs 90a-real" in (out / "build.log").read_text()
    assert json.loads((out / "verify.json").read_text())["card"] == "NVIDIA H200"


def test_a_failed_test_is_named_and_fails_the_run(verify):
    done, out = verify(tests=1, more='<testcase classname="a" name="bad"><failure/></testcase>')
    assert done.returncode == 1
    assert "- failed: a::bad" in (out / "summary.md").read_text()
    assert "| kernels | ok |" in (out / "summary.md").read_text()


def test_a_failed_build_ends_the_run_with_a_summary(verify):
    done, out = verify(build=1)
    assert done.returncode == 1
    page = (out / "summary.md").read_text()
    assert "| build | 1 |" in page
    assert "tests |" not in page
    assert {path.name for path in out.iterdir()} == FILES


def test_dry_run_needs_nothing(verify):
    done, out = verify("--dry-run")
    assert done.returncode == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert re.search(r"-m pytest tests --ignore=\S+ -m cuda", (out / "tests.log").read_text())
    assert "compute-sanitizer --tool synccheck" in (out / "sanitizer.log").read_text()


def test_without_a_folder_it_says_how_it_is_used():
    script = str(ROOT / "tools" / "verify_gpu.sh")
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: tools/verify_gpu.sh" in done.stderr


def test_all_steps_end_within_nine_minutes():
    text = (ROOT / "tools" / "verify_gpu.sh").read_text()
    assert "limit=525" in text  # and 15 s for a step that has to be killed and for the summary
    # No command but those of step() and of the first question may take long.
    assert text.count("timeout ") == 1


@pytest.mark.parametrize(
    ("status", "log", "verdict"),
    [
        ("0", "RACECHECK SUMMARY: 0 hazards displayed", "nothing found"),
        ("86", "RACECHECK SUMMARY: 2 hazards displayed", "2 errors"),
        ("1", "ERROR SUMMARY: 0 errors", "tests failed under it (status 1)"),
        ("timeout", "", "timeout"),
        ("127", "not found", "did not start on this machine"),
    ],
)
def test_verdicts(status, log, verdict):
    assert load("tools/gpu_summary.py").sanitizer_verdict(status, log) == verdict


def test_lists_of_kernels_agree():
    """Every kernel is counted or estimated, listed, and can be timed."""
    from benchmarks import _cuda_cases, _cuda_rivals, cuda_kernels

    counts = cuda_kernels.load(cuda_kernels.COUNTS)
    counted = {launch["kernel"] for launch in counts}
    assert not counted & set(cuda_kernels.EXPERIMENTAL)
    assert sorted(counted | set(cuda_kernels.EXPERIMENTAL)) == cuda_kernels.kernels()
    keys = {f"{x['kernel']}|{x['shape']}" for x in counts} | set(_cuda_rivals.TWINS)
    assert keys == set(_cuda_cases.CASES)
    assert {key.split("|")[0] for key in _cuda_rivals.TWINS} == set(cuda_kernels.EXPERIMENTAL)
    assert cuda_kernels.main(["--check"]) == 0


def test_estimates_of_cudnn_are_for_kernels_of_the_list():
    from benchmarks import _cuda_cases, _cuda_rivals

    assert set(_cuda_rivals.CUDNN) <= set(_cuda_cases.CASES)
    # 2 x 9 x 512 x 1024 x 41 x 41 operations, at 65 % of 790 TFLOP/s, and a launch.
    name = f"dense_mma_kernel|{_cuda_rivals.LARGE_FOV_NAME}, bfloat16, channels_last"
    assert _cuda_rivals.CUDNN[name] == pytest.approx(15.865e9 / 513.5e12 + 2e-6, rel=1e-3)
    # 36 taps, each reads 2048 x 65 x 65 numbers of 2 bytes: longer than the products of 21 outputs.
    head = _cuda_rivals.dense(65, 2048, _cuda_rivals.V2_HEAD, 2)
    assert head == pytest.approx(36 * 17.305e6 / 5.5e12 + 5 * 2e-6, rel=0.01)


def test_operators_of_a_gpu_are_adopted(monkeypatch, tmp_path):
    from benchmarks import cuda_kernels

    for name in ("GPU", "OPERATORS", "DOCUMENT"):
        monkeypatch.setattr(cuda_kernels, name, tmp_path / name)
    cuda_kernels.DOCUMENT.write_text("<!-- cuda-kernels -->\n<!-- /cuda-kernels -->\n")
    times = {"call": 1e-5, "rival": 3e-5, "compiled": {"call": 2e-5, "rival": 3e-5}}
    measured = {"card": "a card", "commit": "abc", "kernels": {}, "operators": {"head": times}}
    (tmp_path / "kernels.json").write_text(json.dumps(measured))
    assert cuda_kernels.main(["--adopt", str(tmp_path / "kernels.json")]) == 0
    written = cuda_kernels.DOCUMENT.read_text()
    assert "on a card, commit abc" in written
    assert "| head | 10.0 us | 3.00x | 1.50x |" in written


def test_operators_are_those_of_torch(monkeypatch):
    """On the CPU, with fewer numbers."""
    from benchmarks import _cuda_operators

    def small(*shape, dtype, last):
        return torch.randn(1, 32, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)

    made = torch.randn
    counts = {2048: 32, 512: 32, 1024: 24, 256: 8}

    def randn(*shape, device=None):
        return made(*[counts.get(n, n) for n in shape])

    monkeypatch.setattr(_cuda_operators, "pictures", small)
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for name in ("zeros", "ones"):
        own = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda n, device=None, own=own: own(counts[n]))
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # gradients of the results
    for name, make in _cuda_operators.OPERATORS.items():
        if "depthwise" in name:
            continue  # its groups are a number of the case
        results = [call() for call in make()[:3]]
        rows = [row if isinstance(row, tuple) else (row,) for row in results]
        for own, *others in zip(*rows, strict=True):
            for other in others:
                assert own.shape == other.shape, name
                bound = 0.02 * float(other.abs().max())
                assert 0 < float((own - other).abs().max()) + bound <= 2 * bound, name


def test_share_of_products_on_a_map():
    from benchmarks._cuda_rivals import Branch, share_on_map

    x = torch.ones(1, 1, 9, 9, dtype=torch.float64)
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    for rate in (1, 4, 20):
        products = torch.nn.functional.conv2d(x, weight, padding=rate, dilation=rate).sum()
        assert share_on_map(9, [Branch(5, 3, rate)]) == pytest.approx(float(products) / (9 * 81))
    assert share_on_map(9, [Branch(5, 1, 1)]) == 1


def test_times_of_calls_that_launch_a_kernel_more_than_once():
    from benchmarks import _cuda_measure

    assert _cuda_measure.per_call([]) is None
    assert _cuda_measure.per_call([1.0, 2.0] * _cuda_measure.ROUNDS) == 3
    assert _cuda_measure.per_call([2.0] * (_cuda_measure.ROUNDS + 1)) == pytest.approx(2.1)


def test_what_is_measured_is_kept_with_its_prediction(monkeypatch, tmp_path):
    """The file is whole after each kernel; what users wait for comes first, twins apart."""
    from benchmarks import _cuda_measure, _cuda_rivals, cuda_kernels

    seen = []

    def measure_all(wanted, save, results):
        results = results or {"card": "a card", "commit": "abc", "kernels": {}}
        for kernel, shape in wanted:
            result = {"seconds": 1e-6, "card": "a card", "commit": "abc"}
            results["kernels"][f"{kernel}|{shape}"] = result
            save(results)
            seen.append(json.loads(path.read_text()))
        return results

    path = tmp_path / "kernels.json"
    monkeypatch.setattr(_cuda_measure, "measure_all", measure_all)
    operators = []
    monkeypatch.setattr(_cuda_measure, "add_operators", lambda *given: operators.append(given[0]))
    cuda_kernels.measure(path)
    first = set(_cuda_rivals.CUDNN) - set(_cuda_rivals.TWINS)
    first -= {key for key in first if key.split("|")[0] in cuda_kernels.SWITCHED}
    assert set(seen[len(first) - 1]["kernels"]) == first
    counts = cuda_kernels.load(cuda_kernels.COUNTS)
    assert len(seen[-1]["kernels"]) == len(counts)
    *_, last = seen[-1]["kernels"]
    assert last.split("|")[0] in cuda_kernels.SWITCHED
    assert not operators
    cuda_kernels.measure(path, twins=True)
    assert len(seen[-1]["kernels"]) == len(counts) + len(_cuda_rivals.TWINS)
    assert operators and all("twin" in name for name in operators[0])
    for key, result in seen[-1]["kernels"].items():
        assert result["predicted"] > 0, key
    rows = cuda_kernels.table(counts, seen[-1]["kernels"])
    assert rows.count("GPU-proven (a card, abc)") == len(seen[-1]["kernels"])


def test_a_kernel_that_fails_leaves_the_others(monkeypatch):
    from benchmarks import _cuda_calls, _cuda_measure

    def calls(name):
        return lambda: _cuda_calls.switched(
            lambda: _cuda_calls.Calls(lambda: name, lambda: "rival")
        )()

    def seconds(kernel, call):
        assert os.environ["PYDENSE_EXPERIMENTAL_KERNELS"] == "1"
        if call() == "b":
            raise RuntimeError("an illegal | access\nwas encountered")
        return None if call() == "c" else 2e-6

    monkeypatch.delenv("PYDENSE_EXPERIMENTAL_KERNELS", raising=False)
    monkeypatch.setattr(_cuda_measure, "CASES", {f"{name}|n": calls(name) for name in "abcd"})
    monkeypatch.setattr(_cuda_measure, "kernel_seconds", seconds)
    monkeypatch.setattr(_cuda_measure, "call_seconds", lambda calls: [1e-6, 3e-6])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    saved = []
    found = _cuda_measure.measure_all([(name, "n") for name in "abcd"], saved.append)
    assert list(found["kernels"]) == ["a|n", "d|n"] and len(saved) == 4
    assert found["kernels"]["d|n"]["rival"] == 3e-6
    assert found["errors"] == {"b|n": "RuntimeError('an illegal / access\\nwas encountered')"}
    assert "PYDENSE_EXPERIMENTAL_KERNELS" not in os.environ


def test_compiled_rivals_are_timed_once_and_kept_one_by_one(monkeypatch):
    from benchmarks import _cuda_calls, _cuda_measure

    def shared():
        return _cuda_calls.Calls(lambda: "ours", None, lambda: "compiled")

    def broken():
        return _cuda_calls.Calls(lambda: "ours", None, lambda: "broken")

    def times(calls):
        answers = [call() for call in calls]
        if "broken" in answers:
            raise RuntimeError("no such kernel")
        return [{"ours": 1e-6, "compiled": 3e-6}[answer] for answer in answers]

    cases = {
        "a|n": shared,
        "b|n": shared,
        "c|n": broken,
        "d|n": lambda: _cuda_calls.Calls(lambda: "ours"),
        "not measured|n": shared,
    }
    monkeypatch.setattr(_cuda_measure, "CASES", cases)
    monkeypatch.setattr(_cuda_measure, "call_seconds", times)
    results = {"kernels": {key: {} for key in list(cases)[:4]}, "operators": {"o": {}}}
    saved = []
    operators = {"o": lambda: shared(), "not measured": lambda: shared()}
    _cuda_measure.add_compiled(operators, results, lambda: saved.append(json.dumps(results)))
    assert results["operators"] == {"o": {"compiled": {"call": 1e-6, "rival": 3e-6}}}
    assert results["kernels"] == {
        "a|n": {"compiled": {"call": 1e-6, "rival": 3e-6}},
        "b|n": {},
        "c|n": {"compiled": {"error": "RuntimeError('no such kernel')"}},
        "d|n": {},
    }
    assert len(saved) == 3
    assert "error" not in saved[1]


def test_a_kernel_that_nobody_counted_is_refused(monkeypatch):
    from benchmarks import cuda_kernels

    monkeypatch.setattr(cuda_kernels, "kernels", lambda: ["selftest_kernel", "new_kernel"])
    with pytest.raises(ValueError, match=r"differ in .*new_kernel"):
        counts = cuda_kernels.load(cuda_kernels.COUNTS)
        cuda_kernels.document(cuda_kernels.DOCUMENT.read_text(), counts, {})


def test_old_counts_are_found():
    from benchmarks import cuda_kernels

    old = [{"kernel": "k", "shape": "n", "sectors": 4, "instructions": 100}]
    same = [{**old[0], "instructions": 120}]
    assert cuda_kernels.changed(old, same) == []
    assert cuda_kernels.changed(old, [{**old[0], "sectors": 5}]) == ["k at n"]
    assert cuda_kernels.changed(old, []) == ["k at n"]


def test_instructions_of_basic_blocks():
    from benchmarks import _cuda_counts

    text = """
0000000000001000 <kernel>:
    1000:\tpush   %rbp
    1001:\tcall   2000 <__sanitizer_cov_trace_pc>
    1006:\tmov    0x10(%rsp),%rax
    100b:\tlea    0x4(%rax),%rdi
    1010:\tcall   3000 <__tsan_read4>
    1015:\tmov    0x4(%rax),%ecx
    1018:\tjle    1030 <kernel+0x30>
    101a:\tcall   2000 <__sanitizer_cov_trace_pc>
    101f:\tadd    $0x1,%ecx
    1022:\tnop
    1023:\tret
"""
    assert _cuda_counts.block_sizes(text) == {0x1006: 3, 0x101F: 1}
    launch = {"blocks": [[0x1006, 10], [0x101F, 5], [0x9999, 7]]}
    assert _cuda_counts.with_instructions(launch, {0x1006: 3, 0x101F: 1}) == {"instructions": 35}
