# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: start, version, usage errors, exit codes, `pydense info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from _cli import run, run_error, run_ok

import pydense
from pydense import _library, cli

COMMAND = (sys.executable, "-m", "pydense.cli")


def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("arguments", [("--help",), ("refine", "--help"), ("--version",), ()])
def test_start_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pydense.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in lines}
    assert "pydense" in imported  # the list really is what was imported
    assert not imported & {"torch", "numpy", "PIL", "rich", "skimage", "scipy"}


def test_help_starts_within_300_ms() -> None:
    def seconds() -> float:
        begin = time.perf_counter()
        done = start("--help")
        assert done.returncode == 0
        assert "refine" in done.stdout
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.3


def test_version() -> None:
    assert run_ok("--version").out == f"pydense {pydense.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("polish",), "polish"),
        (("refine", "a.png", "b.png"), "-o"),
        (("refine", "a.png", "-o", "c.png"), "give either IMAGE and ANNOTATION"),
        (("refine", "-o", "c.png"), "give either IMAGE and ANNOTATION"),
        (("refine", "a", "b", "--input-dir", "c", "-o", "d.png"), "give either IMAGE"),
        (("refine", "--input-dir", "c", "-o", "d.png"), "give either IMAGE"),
        (("refine", "a", "b", "-o", "c.jpg"), "--output must end in .png, got c.jpg"),
        (("refine", "a", "b", "-o", "c.png", "--labels", "d.txt"), "--labels must end in .png or"),
        (
            ("refine", "a", "b", "-o", "c.png", "--overlay", "d.eps"),
            "--overlay must end in .png or",
        ),
        (("refine", "a", "b", "-o", "c.png", "--probabilities", "d.png"), "--probabilities must"),
        (("refine", "a", "b", "-o", "c.png", "--gt-prob", "1"), "must be between 0 and 1"),
        (("refine", "a", "b", "-o", "c.png", "--gt-prob", "nan"), "--gt-prob"),
        (("refine", "a", "b", "-o", "c.png", "--gaussian-sxy", "0"), "must be greater than 0"),
        (("refine", "a", "b", "-o", "c.png", "--bilateral-srgb", "-1"), "must be greater than 0"),
        (("refine", "a", "b", "-o", "c.png", "--bilateral-sxy", "inf"), "--bilateral-sxy"),
        (("refine", "a", "b", "-o", "c.png", "--bilateral-compat", "x"), "--bilateral-compat"),
        (("refine", "a", "b", "-o", "c.png", "--iterations", "-1"), "must be in 0..10000"),
        (("refine", "a", "b", "-o", "c.png", "--iterations", "2.5"), "--iterations"),
        (("refine", "a", "b", "-o", "c.png", "--threads", "0"), "must be in 1..1024"),
        (("refine", "a", "b", "-o", "c.png", "--max-pixels", "0"), "must be greater than 0"),
        (("refine", "a", "b", "-o", "c.png", "--overlay-opacity", "1.1"), "must be in 0..1"),
        (("refine", "a", "b", "-o", "c.png", "--unknown", "#12345g"), "must be like #ff0000"),
        (("refine", "a", "b", "-o", "c.png", "--unknown", "black"), "must be #rrggbb"),
        (("refine", "a", "b", "-o", "c.png", "--unknown", "-1"), "--unknown"),
        (("refine", "a", "b", "-o", "c.png", "--normalization", "most"), "--normalization"),
        (("refine", "a", "b", "-o", "c.png", "--unknown", "3", "--no-zero-unsure"), "not allowed"),
        (("demo", "--threads", "0"), "must be in 1..1024"),
        (("refine", "a", "b", "-o", "c.png", "--evil\x1b[2J"), r"--evil\x1b[2J"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], message: str) -> None:
    assert message in run_error(*arguments, code=2)


def test_process_exit_codes_and_streams() -> None:
    done = start("refine", "missing.png", "missing.png", "-o", "/nonexistent/out.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("pydense: error: cannot write /nonexistent/out.png: no such folder\n")
    assert start("refine").returncode == 2


def test_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [*COMMAND, "info", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_refine_does_not_import_torch() -> None:
    program = (
        "import sys; from pydense.cli import main; import pydense.cli._refine;"
        "code = main(['refine', '/dev/null', '/dev/null', '-o', 'x.png']);"
        "import pydense.cli._inference, pydense.densecrf; print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 False\n"


def test_info_json_is_build_info() -> None:
    assert json.loads(run_ok("info", "--json").out) == json.loads(json.dumps(pydense.build_info()))


def test_info_table_shows_every_fact() -> None:
    out = "".join(run_ok("info").out.split())
    for key, value in pydense.build_info().items():
        assert key.replace("_", "") in out.replace("_", ""), key
        for part in value if isinstance(value, list) else [value]:
            # A narrow table folds long values; the columns' frame stands between the pieces.
            assert str(part or "none").replace(" ", "") in out.replace("│", ""), key


def test_info_selftest_passes_here() -> None:
    result = run_ok("info", "--selftest")
    assert "FAILED" not in result.out
    report = json.loads(run_ok("info", "--selftest", "--json").out)
    assert report["version"] == pydense.__version__
    assert len(report["selftest"]) >= 2
    assert all(check["ok"] is True for check in report["selftest"])


def test_info_selftest_reports_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [("numpy", True, "fine"), ("torch [red]", False, "wrong result")]
    monkeypatch.setattr(_library, "selftest", lambda: results)
    result = run("info", "--selftest")
    assert result.code == 1
    assert "FAILED" in result.out
    assert "torch [red]" in result.out  # shown as it is, not taken for markup
    result = run("info", "--selftest", "--json")
    assert result.code == 1
    assert json.loads(result.out)["selftest"][1] == {
        "name": "torch [red]",
        "ok": False,
        "detail": "wrong result",
    }


def test_failing_import_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("pydense: the compiled core is missing")

    monkeypatch.setattr(pydense, "build_info", fail, raising=False)
    assert run_error("info") == "pydense: the compiled core is missing"


def test_unexpected_error_has_no_traceback_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(pydense, "build_info", fail, raising=False)
    result = run("info")
    assert result.code == 1
    assert result.err.startswith("pydense: error: internal error: KeyError: 'surprise' (")
    assert result.err.count("\n") == 1
    monkeypatch.setenv("PYDENSE_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run("info")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "pydense: interrupted\n"),
        (MemoryError(), 1, "pydense: error: not enough memory\n"),
    ],
)
def test_interrupt_and_memory(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(pydense, "build_info", fail, raising=False)
    assert run("info") == (code, "", message)


def test_main_takes_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pydense", "--version"])
    assert cli.main() == 0
    assert pydense.__version__ in capsys.readouterr().out


def test_ascii_terminal() -> None:
    done = start("info", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert pydense.__version__ in done.stdout
