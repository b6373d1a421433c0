# SPDX-License-Identifier: Apache-2.0
"""The project's checks must catch what they are there for."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ["-march=x86-64-v2"]
AVX512 = [*BASELINE, "-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]

needs_x86_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64"
    or shutil.which("g++") is None
    or shutil.which("objdump") is None,
    reason="needs g++ and binutils for x86-64",
)


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with patch.object(sys, "path", [str((ROOT / path).parent), *sys.path]):  # as a script has it
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check_isa() -> ModuleType:
    return load("tools/check_isa.py")


def compile_unit(build: Path, target: str, flags: list[str], code: str, name: str = "unit") -> None:
    folder = build / "CMakeFiles" / f"{target}.dir"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            "g++",
            "-O3",
            "-std=c++20",
            *flags,
            "-x",
            "c++",
            "-",
            "-c",
            "-o",
            folder / f"{name}.cpp.o",
        ],
        input=code,
        text=True,
        check=True,
    )


def loop(scope: str, helper: str = "", target: str = "") -> str:
    """A unit with one kernel in pydense::<scope>, which uses ``helper`` defined before it."""
    return f"""
{helper}
namespace pydense::{scope} {{
void axpy(float* y, const float* x, int n) {{
  for (int i = 0; i < n; ++i) {{ y[i] += {target or "2.0F *"} (x[i]); }}
}}
}}
"""


@needs_x86_compiler
class TestCheckIsa:
    def test_clean_build_passes(self, check_isa, tmp_path, capsys):
        helper = """
template <class T> __attribute__((noinline)) T twice(T x) { return x + x; }
namespace pydense::avx512 {
struct Lane { float f; Lane operator+(Lane o) const { return {f + o.f}; } };
}
"""
        kernel = loop("avx512", helper, "twice(pydense::avx512::Lane{2.0F}).f *")
        compile_unit(tmp_path, "pydense_isa_avx512", AVX512, kernel)
        compile_unit(tmp_path, "pydense_isa_baseline", BASELINE, loop("baseline"))
        compile_unit(tmp_path, "pydense_core", [], loop("core"))
        assert check_isa.main([str(tmp_path)]) == 0
        assert "0 leaks" in capsys.readouterr().out

    def test_shared_helper_in_an_avx512_unit_is_a_leak(self, check_isa, tmp_path, capsys):
        helper = """
namespace pydense {
__attribute__((noinline)) inline float smooth(float x) { return x * 0.5F + 1.0F; }
}
"""
        kernel = loop("avx512", helper, "pydense::smooth")
        compile_unit(tmp_path, "pydense_isa_avx512", AVX512, kernel)
        assert check_isa.main([str(tmp_path)]) == 1
        out = capsys.readouterr().out
        assert "weak pydense::smooth(float) is not in pydense::avx512" in out

    @pytest.mark.parametrize(
        ("target", "flags", "instructions"),
        [
            ("pydense_core", AVX512, "EVEX"),
            ("libpydense_torch", [*BASELINE, "-mavx2"], "VEX"),
            ("pydense_isa_baseline", [*BASELINE, "-mavx"], "VEX"),
            ("pydense_isa_avx2", AVX512, "EVEX"),
            ("pydense_isa_avx2_tests", AVX512, "EVEX"),
        ],
    )
    def test_wrong_flags_are_a_leak(self, check_isa, tmp_path, capsys, target, flags, instructions):
        mask = "x[i] < 0.0F ? 0.5F : 3.0F *"
        scope = target.removeprefix("pydense_isa_").removesuffix("_tests")
        compile_unit(tmp_path, target, [*flags, "-mprefer-vector-width=512"], loop(scope, "", mask))
        assert check_isa.main([str(tmp_path)]) == 1
        assert f"has {instructions} " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("code", "text", "level"),
        [
            ("0f 58 c1", "addps  %xmm1,%xmm0", 0),
            ("c5 f8 58 c1", "vaddps %xmm1,%xmm0,%xmm0", 1),
            ("c4 e2 75 b8 c2", "vfmadd231ps %ymm2,%ymm1,%ymm0", 1),
            ("65 c5 f8 10 00", "vmovups %gs:(%rax),%xmm0", 1),
            ("c5 f8 92 c8", "kmovw  %eax,%k1", 2),
            ("62 f1 7c 48 58 c1", "vaddps %zmm1,%zmm0,%zmm0", 2),
            ("62 f2 76 48 52 c2", "vdpbf16ps %zmm2,%zmm1,%zmm0", 3),
            ("c4 e2 72 5c c2", "tdpbf16ps %tmm1,%tmm2,%tmm0", 4),
            ("c4 e2 78 49 c0", "tilerelease", 4),
            ("0f 0b", "ud2", 0),
        ],
    )
    def test_levels_of_instructions(self, check_isa, code, text, level):
        assert check_isa.instruction_level(bytes.fromhex(code), text) == level

    def test_empty_folder_is_an_error(self, check_isa, tmp_path):
        with pytest.raises(SystemExit) as stop:
            check_isa.main([str(tmp_path)])
        assert stop.value.code == 2


def test_check_spdx_finds_a_file_without_the_line(tmp_path, capsys):
    check_spdx = load("tools/check_spdx.py")
    good, script, bad = tmp_path / "good.h", tmp_path / "run.sh", tmp_path / "bad.py"
    good.write_text(f"// {check_spdx.LINE}\n")
    script.write_text(f"#!/bin/sh\n# {check_spdx.LINE}\n")
    bad.write_text(f'"""Late."""\n# {check_spdx.LINE}\n')
    assert check_spdx.main([str(good), str(script)]) == 0
    assert check_spdx.main([str(good), str(bad)]) == 1
    assert "bad.py" in capsys.readouterr().out


class TestCheckSkips:
    REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_ok"/>
<testcase classname="tests.test_a" name="test_gpu">
  <skipped type="pytest.skip" message="no GPU on this machine"/></testcase>
<testcase classname="tests.test_a" name="test_expected"><skipped type="pytest.xfail"/></testcase>
{more}</testsuite></testsuites>"""

    @pytest.mark.parametrize(
        ("more", "enforced", "status", "total"),
        [
            ("", True, 0, "total: 2 passed, 0 failed, 1 skipped"),
            ('<skipped type="pytest.skip" message="lazy"/>', False, 0, "0 failed, 2 skipped"),
            ('<skipped type="pytest.skip" message="lazy"/>', True, 1, "0 failed, 2 skipped"),
            ("<failure/>", False, 1, "1 failed, 1 skipped"),
        ],
    )
    def test_unlisted_skip_is_refused(self, tmp_path, capsys, more, enforced, status, total):
        check_skips = load("tools/ci/check_skips.py")
        report = tmp_path / "report.xml"
        case = f'<testcase classname="tests.test_b" name="test_b">{more}</testcase>' if more else ""
        report.write_text(self.REPORT.format(more=case))
        arguments = [str(report), *(["--enforce"] if enforced else [])]
        assert check_skips.main(arguments) == status
        assert total in capsys.readouterr().out

    def test_a_run_without_tests_is_refused(self, tmp_path):
        report = tmp_path / "report.xml"
        report.write_text("<testsuites><testsuite></testsuite></testsuites>")
        assert load("tools/ci/check_skips.py").main([str(report)]) == 1


class TestReadmeCommand:
    def test_readme_has_both_commands_with_torch_pinned(self):
        command = load("tools/ci/readme_command.py").command
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        for name in ("demo", "test"):
            assert "torch==2.13.0" in command(text, name)

    def test_missing_or_doubled_command_is_refused(self):
        command = load("tools/ci/readme_command.py").command
        block = "<!-- test-command -->\n```sh\nmake test\n```\n"
        assert command(block, "test") == "make test"
        for text in ("make test\n", block + block, block.replace("test-", "demo-")):
            with pytest.raises(ValueError, match=r"README\.md must have one"):
                command(text, "test")
