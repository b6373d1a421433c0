# SPDX-License-Identifier: Apache-2.0
"""The checks of CUDA sources must catch what they are there for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_tools import load

ROOT = Path(__file__).resolve().parent.parent

USAGE = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Zplain:
  REG:26 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Zheavy:
  REG:255 STACK:96 SHARED:1024 LOCAL:0 CONSTANT[2]:104 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


SASS = """
Fatbin elf code:
================
arch = sm_90a
host = linux

\tcode for sm_90a
\t.target\tsm_90a

\t\tFunction : _Zproduct
\t.headerflags\t@"EF_CUDA_SM90"
                                                                /* 0x000a00ff017624 */
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017624 */
        /*0050*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0060*/              @UP1 BRA `(.L_x_0) ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
.L_x_0:
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
\t\t..........

\t\tFunction : _Zlocal
        /*0000*/                   STL.64 [R1], R2 ;
"""


@pytest.fixture(scope="module")
def gates():
    return load("tools/ci/cuda_gates.py")


def test_resource_usage_is_read(gates):
    assert list(gates.read_usage(USAGE)) == [
        gates.Kernel("_Zplain", "sm_80", 26, 512, 0),
        gates.Kernel("_Zheavy", "sm_90a", 255, 0, 96),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "_Zheavy on sm_90a: 96 bytes of local memory"),
        ("_Zheavy sm_90a stack=96 its table has a dynamic index", None),
        ("heavy * stack=200 its table has a dynamic index", None),
        ("_Zheavy sm_80 stack=96 its table has a dynamic index", "_Zheavy on sm_90a"),
        ("_Zheavy sm_90a stack=95 its table has a dynamic index", "_Zheavy on sm_90a"),
        ("_Zplain * stack=1 is not needed at all", "nothing needs '_Zplain'"),
    ],
)
def test_spills_need_an_exception_that_is_needed(gates, line, problem):
    problems = gates.judge(gates.read_usage(USAGE), gates.read_allowances(line))
    assert bool(problems) == (problem is not None)
    assert problem is None or any(problem in text for text in problems)


@pytest.mark.parametrize("line", ["_Zheavy * stack=1", "_Zheavy * stack=1 because"])
def test_an_exception_needs_a_reason(gates, line):
    with pytest.raises(ValueError, match="a reason is needed"):
        gates.read_allowances(line)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("_Zplain * registers=26 shared=512", None),
        ("_Zplain sm_80 registers=25 shared=512", "_Zplain on sm_80: 26 registers"),
        ("_Zplain * registers=26 shared=511", "512 bytes of shared memory, allowed are 26 and 511"),
        ("_Zplain sm_90a registers=26 shared=512", "no kernel is '_Zplain'"),
        ("_Z registers=26 shared=512", "cannot read"),
    ],
)
def test_budgets(gates, line, problem):
    kernels = list(gates.read_usage(USAGE))
    if problem == "cannot read":
        with pytest.raises(ValueError, match=problem):
            gates.read_budgets(line)
        return
    problems = gates.over_budget(kernels, gates.read_budgets(line))
    assert bool(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_every_own_kernel_has_a_budget(gates):
    """The lines that --budgets prints are such budgets, and each of them is needed."""
    used = [("mine<float>", "sm_80", 30, 0), ("mine<double>", "sm_80", 41, 512)]
    used += [("mine<float>", "sm_90a", 255, 16), ("other", "sm_80", 8, 0)]
    kernels = [gates.Kernel(f"pydense::{name}", *rest, 0) for name, *rest in used]
    kernels.append(gates.Kernel("cub::sort", "sm_80", 255, 0, 0))
    lines = gates.budget_lines(kernels)
    assert lines == [
        r"pydense::mine\b sm_80 registers=48 shared=512",
        r"pydense::mine\b sm_90a registers=255 shared=16",
        r"pydense::other\b sm_80 registers=8 shared=0",
    ]
    assert gates.over_budget(kernels, gates.read_budgets("\n".join(lines))) == []
    for i in range(len(lines)):
        budgets = gates.read_budgets("\n".join(lines[:i] + lines[i + 1 :]))
        assert any("has no budget" in problem for problem in gates.over_budget(kernels, budgets))


def test_budgets_of_the_project_can_be_read(gates):
    assert gates.read_budgets(gates.BUDGETS.read_text(encoding="utf-8"))


def test_machine_code_is_read(gates):
    product, local = gates.read_code(SASS)
    assert product == (
        "_Zproduct",
        "sm_90a",
        {
            "LDC",
            "LDG.E.128.CONSTANT",
            "BRA",
            "HMMA.16816.F32.BF16",
            "HGMMA.64x128x16.F32.BF16",
            "STG.E.64",
        },
    )
    assert local == ("_Zlocal", "sm_90a", {"STL.64"})
    assert product.has("LDG.128") and product.has("LDG") and product.has("HMMA.16816")
    assert not any(map(product.has, ("LDG.64", "STG.128", "IMMA", "LD", "HMMA.TF32")))


GOOD = "_Zproduct * HMMA.BF16 LDG.128 !STG.128"


LOOP = """
arch = {architecture}
\t\tFunction : _Zmatrices
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017624 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R8, R12, R8 ;
        /*0050*/                   IADD3 R2, R2, 0x20, RZ ;
        /*0060*/              @!P0 BRA 0x20 ;
        /*0070*/               @P1 BRA 0x90 ;
        /*0080*/              @!P2 BRA 0x10 ;
        /*0090*/                   EXIT ;
\t\tFunction : _Zplain
        /*0000*/                   FADD R1, R1, R1 ;
        /*0010*/              @!P0 BRA 0x0 ;
"""


def test_main_loops_are_read_and_held(gates):
    """Of three instructions at 0x20 and 0x10, the longer loop has one product more."""
    loops = gates.cuda_loops
    found = list(loops.read_loops(LOOP.format(architecture="sm_90a")))
    assert found == [("_Zmatrices", 8 / 3)]
    inner = LOOP.replace("/*0010*/                   HMMA", "/*0010*/                   FADD", 1)
    assert list(loops.read_loops(inner.format(architecture="sm_90a"))) == [("_Zmatrices", 5 / 2)]
    assert not list(loops.read_loops(LOOP.format(architecture="sm_80")))
    entry = '[{{"code": "{}", "instructions": {}}}]'
    assert loops.too_long(found, entry.format("matrices", 2.7)) == []
    assert "2.7 instructions" in loops.too_long(found, entry.format("matrices", 2.6))[0]
    assert "no kernel is 'other'" in loops.too_long(found, entry.format("other", 9))[0]


@pytest.mark.parametrize(
    ("lines", "exception", "problem"),
    [
        ((GOOD,), "_Zlocal * stack=8 of a library", None),
        ((GOOD,), "_Zlocal sm_80 stack=8 of a library", "_Zlocal on sm_90a: has STL, of"),
        ((GOOD,), "", "_Zlocal on sm_90a: has STL, of local memory"),
        (("_Zproduct * IMMA",), "_Zlocal * stack=8 of a library", "has no IMMA"),
        (("_Zproduct * LDG.64",), "_Zlocal * stack=8 of a library", "has no LDG.64"),
        (("_Zproduct * !LDG",), "_Zlocal * stack=8 of a library", "sm_90a: has LDG"),
        ((GOOD, "_Zother * LDG"), "_Zlocal * stack=8 of a library", "no kernel is"),
        (("_Zproduct sm_80 HMMA",), "_Zlocal * stack=8 of a library", "no kernel is"),
        ((), "_Zlocal * stack=8 of a library", "cuda_sass.txt does not name it"),
    ],
)
def test_instructions_are_expected(gates, lines, exception, problem):
    codes = list(gates.read_code(SASS))
    allowances = gates.read_allowances(exception)
    problems = gates.unexpected(codes, gates.read_expectations("\n".join(lines)), allowances)
    assert bool(problems) == (problem is not None)
    assert problem is None or any(problem in text for text in problems)


@pytest.mark.parametrize("line", ["_Zproduct *", "_Zproduct", "_Zproduct * hmma", "_Z * !"])
def test_expectations_that_cannot_be_read(gates, line):
    with pytest.raises(ValueError, match=r"cuda_sass.txt: cannot read"):
        gates.read_expectations(line)


def test_expectations_of_the_project_can_be_read(gates):
    assert gates.read_expectations(gates.INSTRUCTIONS.read_text(encoding="utf-8"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_lost_vector_load_of_a_real_kernel_is_found(gates, tmp_path):
    if (reader := gates.find_reader()) is None:
        pytest.skip("no cuobjdump")
    source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    expected = gates.read_expectations("kernel * LDG.128 STG.128")
    for alignment, lost in ((16, 0), (8, 2)):
        source.write_text(
            f"struct alignas({alignment}) Four {{ float v[4]; }};\n"
            'extern "C" __global__ void kernel(Four* y, const Four* x) { y[0] = x[1]; }\n'
        )
        subprocess.run(["nvcc", "-arch=sm_80", "-cubin", source, "-o", cubin], check=True)
        codes = list(gates.read_code(gates.dump(reader, "-sass", cubin)))
        assert len(gates.unexpected(codes, expected, [])) == lost


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_local_memory_of_a_real_kernel_is_found(gates, tmp_path):
    if (reader := gates.find_reader()) is None:
        pytest.skip("no cuobjdump")
    source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    source.write_text(
        "__global__ void kernel(float* y, const int* i, int n) {\n"
        "  float table[200];\n"
        "  for (int k = 0; k < 200; ++k) table[k] = y[k * n];\n"
        "  for (int k = 0; k < n; ++k) y[k] = table[i[k]];\n}\n"
    )
    subprocess.run(["nvcc", "-arch=sm_80", "-cubin", source, "-o", cubin], check=True)
    (kernel,) = gates.read_usage(gates.dump(reader, "-res-usage", cubin))
    assert kernel.stack >= 800
    assert gates.judge([kernel], []) != []


def test_kernels_are_launched_through_the_macro_alone():
    launches = [
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "tests/simt")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".cu", ".cuh", ".h", ".cpp") and "<<<" in path.read_text("utf-8")
    ]
    assert launches == ["csrc/common/launch.cuh"]


def test_kernel_sources_know_nothing_of_torch_or_cub():
    """Sorting and scanning alone are the library's."""
    forbidden = re.compile(r"#include\s*[<\"](torch|ATen|c10|cub|thrust|cooperative_groups)")
    for path in (ROOT / "csrc").rglob("*.cu*"):
        if path.name != "device_sort_cuda.cu":
            assert not forbidden.search(path.read_text("utf-8")), path
