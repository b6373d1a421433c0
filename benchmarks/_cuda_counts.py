# SPDX-License-Identifier: Apache-2.0
"""What CUDA kernels ask of memory and arithmetic, counted by the shim on the CPU (tests/simt)."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TRACE_CALL = re.compile(r"^\s*([0-9a-f]+):\s+call\s.*<__sanitizer_cov_trace_pc")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
# Of a call only the compiler's frames, of the watched accesses only the access itself.
NOT_COUNTED = {"push", "pop", "nop", "nopw", "nopl", "ret", "endbr64", "xchg", "data16", "cs"}
BLOCK_ENDS = {"jmp", "ret"}


def block_sizes(disassembly: str) -> dict[int, int]:
    """Instructions of each basic block, by the address after its call of the trace.

    What GCC made of the kernel for x86-64 stands for what nvcc makes of it: one of its instructions
    is taken for one of a GPU. The calls that watch accesses, and the address they take, are left
    out: the access itself follows them.
    """
    sizes: dict[int, int] = {}
    at: int | None = None  # the block that is read
    waits = False  # a call of the trace was seen; its return address is the next instruction's
    count = 0
    previous_sets_argument = False
    for line in disassembly.splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        if waits:
            at, waits, count = int(match[1], 16), False, 0
            previous_sets_argument = False
        if TRACE_CALL.match(line):
            if at is not None:
                sizes[at] = count
            at, waits = None, True
            continue
        if at is None:
            continue
        name, operands = match[2], match[3]
        if name == "call" and "__tsan_" in operands:
            count -= previous_sets_argument
        elif name not in NOT_COUNTED and not operands.endswith(",%rsp"):
            count += 1
        previous_sets_argument = operands.endswith(",%rdi")
        if name in BLOCK_ENDS:
            sizes[at] = count
            at = None
    return sizes


def count(build: Path) -> list[dict[str, Any]]:
    """The counted launches of every driver of a SIMT build, with their instructions."""
    found = []
    for program in sorted((build / "tests" / "simt").glob("simt_*_trace")):
        if program.name in ("simt_planted_trace", "simt_wgmma_trace"):  # of the harness itself
            continue
        with tempfile.TemporaryDirectory() as folder:
            counters = Path(folder) / "counters.json"
            subprocess.run(
                [program, "--schedules", "1", "--counters", counters],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            lines = counters.read_text(encoding="utf-8").splitlines()
        if not lines:
            continue
        disassembly = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", program],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        sizes = block_sizes(disassembly)
        found += [with_instructions(json.loads(line), sizes) for line in lines]
    return found


def with_instructions(launch: dict[str, Any], sizes: Mapping[int, int]) -> dict[str, Any]:
    """The launch with ``instructions`` of warps in place of its basic blocks."""
    blocks = launch.pop("blocks")
    return {
        **launch,
        "instructions": sum(sizes.get(address, 0) * warps for address, warps in blocks),
    }


# NVIDIA H200 SXM: 4.8 TB/s, of which 85 % can be reached, 132 SMs, 1.755 GHz under load. In a clock
# an SM starts 4 warp instructions, moves 64 bytes to or from its first-level cache and makes one
# pass over its shared memory.
H200 = "NVIDIA H200"
BANDWIDTH = 0.85 * 4.8e12
CLOCKS = 132 * 1.755e9
LAUNCH_SECONDS = 2e-6
# Of 16 x 8 with depth 16, in a clock of an SM: what mma.sync reaches, 60 % of the datasheet's rate.
MATRIX_PRODUCTS = 0.6


LOOPS = Path(__file__).with_name("cuda") / "loops.json"


@cache
def _loops() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(LOOPS.read_text(encoding="utf-8"))
    return found


def instructions_of(launch: Mapping[str, Any]) -> float:
    """Warp instructions of a launch.

    Where matrix products are nearly all of a kernel, those of nvcc's main loop for each of them
    (``tools/ci/cuda_gates.py`` holds the code to it), else what GCC made of the kernel.
    """
    for loop in _loops():
        if loop["kernel"] == launch["kernel"] and (loop["type"] == "TF32") == (
            "TF32" in launch["shape"]
        ):
            return float(loop["instructions"] * launch["matrix_products"])
    return float(launch["instructions"])


def predict(launch: Mapping[str, Any]) -> tuple[float, str]:
    """Seconds on an H200 at the shape of the prediction, and what takes them.

    The largest of the times that memory, the first-level caches, shared memory, the instructions
    and the tensor cores take alone, and 2 us for each launch.
    """
    scale = float(launch["scale"])
    terms = {
        "memory": scale * launch["moved_bytes"] / BANDWIDTH,
        "cache": scale * launch["sectors"] * 32 / (CLOCKS * 64),
        "shared memory": scale * launch["wavefronts"] / CLOCKS,
        "instructions": scale * instructions_of(launch) / (CLOCKS * 4),
        "tensor cores": scale * launch["matrix_products"] / (CLOCKS * MATRIX_PRODUCTS),
    }
    limit = max(terms, key=lambda name: terms[name])
    overhead = LAUNCH_SECONDS * launch["launches"]
    return terms[limit] + overhead, limit if terms[limit] > overhead else "launch"
