# SPDX-License-Identifier: Apache-2.0
"""The list of CUDA kernels in benchmarks/README.md: state, counts and predicted time of each.

    python -m benchmarks.cuda_kernels --count build/simt     # counts anew, writes the list
    python -m benchmarks.cuda_kernels --verify build/simt    # exit status 1 where counts are old
    python -m benchmarks.cuda_kernels --adopt OUTDIR/kernels.json   # adds what a GPU measured
    python -m benchmarks.cuda_kernels --check                # exit status 1 where the list is old
    python -m benchmarks.cuda_kernels --measure FILE         # on a GPU: time of every kernel
    python -m benchmarks.cuda_kernels --measure-compiled FILE  # adds operators and torch.compile
    python -m benchmarks.cuda_kernels --measure-twins FILE   # adds what the shim cannot run

The counts are in ``benchmarks/cuda/counts.json``, what GPUs measured in ``gpu.json`` beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks._cuda_counts import H200, count, predict
from benchmarks._cuda_rivals import CUDNN, TWINS

COUNTS = ROOT / "benchmarks" / "cuda" / "counts.json"
GPU = ROOT / "benchmarks" / "cuda" / "gpu.json"
OPERATORS = ROOT / "benchmarks" / "cuda" / "operators.json"
DOCUMENT = ROOT / "benchmarks" / "README.md"
BLOCK = re.compile(r"(<!-- cuda-kernels -->\n).*?(<!-- /cuda-kernels -->)", re.DOTALL)
# What the shim cannot run, and nothing chooses by itself; no counts, so an estimate.
EXPERIMENTAL = {
    "dense_wgmma_kernel": (
        "compiled for sm_90a alone, with `wgmma` and copies of boxes; its tiles and steps are "
        "proven on the CPU (`tests/cpp/test_dense_boxes.cpp`), the kernel never ran. It does not "
        "cut long sums, so the 72 tiles of the first shape leave multiprocessors idle. "
        "`PYDENSE_EXPERIMENTAL_KERNELS=1` puts it in the place of `dense_mma_kernel` for 16-bit "
        "types on such a card"
    ),
}
# What the shim runs, and nothing chooses by itself either.
SWITCHED = {
    "separable_mma_kernel": (
        "chosen by `PYDENSE_EXPERIMENTAL_KERNELS=1` alone, because two steps should be faster"
    ),
    "exact_wgmma_kernel": (
        "for sm_90a alone, with `wgmma`, whose emulation is ours as well; never run on a "
        "GPU. `PYDENSE_EXPERIMENTAL_KERNELS=1` puts it in the place of `exact_fast_kernel` on such "
        "a card"
    ),
}
KERNEL = re.compile(
    r"__global__\s+(?:__launch_bounds__\([^)]*\)\s*)?void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\("
)
HEADER = (
    "kernel",
    "state",
    "shape",
    "predicted on H200",
    "limited by",
    "cuDNN, whole call, estimated",
    "moved / minimum",
    "sectors / ideal",
    "measured",
)


def kernels() -> list[str]:
    """Every ``__global__`` function of the project."""
    found = []
    for path in sorted((ROOT / "csrc").rglob("*.cuh")):
        found += KERNEL.findall(path.read_text(encoding="utf-8"))
    return sorted(found)


def row(launch: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """A line of the list."""
    seconds, limit = predict(launch)
    key = f"{launch['kernel']}|{launch['shape']}"
    rival = CUDNN.get(key)
    default = "shim-proven, off" if launch["kernel"] in SWITCHED else "shim-proven"
    state, time = state_of(default, measured.get(key), seconds)
    ideal = launch["sectors"] / launch["ideal_sectors"] if launch["ideal_sectors"] else 1.0
    return [
        f"`{launch['kernel']}`",
        state,
        launch["shape"],
        f"{1e6 * seconds:.1f} us",
        limit,
        f"{1e6 * rival:.0f} us" if rival else "",
        f"{launch['moved_bytes'] / launch['minimum_bytes']:.2f}",
        f"{ideal:.2f}",
        time,
    ]


def state_of(default: str, result: Mapping[str, Any] | None, seconds: float) -> tuple[str, str]:
    """State and measured time of a kernel that should take ``seconds``."""
    if not result:
        return default, ""
    ratio = result["seconds"] / seconds
    return (
        f"GPU-proven ({result['card']}, {result['commit']})",
        f"{1e6 * result['seconds']:.1f} us, {ratio:.2f}x predicted",
    )


def estimated(key: str, measured: Mapping[str, Any]) -> list[str]:
    """A line of the list for a kernel that the shim cannot run."""
    kernel, shape = key.split("|")
    state, time = state_of("experimental", measured.get(key), TWINS[key])
    seconds, rival = f"{1e6 * TWINS[key]:.1f} us", f"{1e6 * CUDNN[key]:.0f} us"
    return [f"`{kernel}`", state, shape, seconds, "tensor cores, estimated", rival, "", "", time]


def table(launches: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> str:
    """The list as Markdown, with the reasons of limits below."""
    rows = [row(launch, measured) for launch in sorted(launches, key=lambda x: x["kernel"])]
    lines = [
        f"| {' | '.join(HEADER)} |",
        "|---|---|---|--:|---|--:|--:|--:|---|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
    lines += [f"| {' | '.join(estimated(key, measured))} |" for key in sorted(TWINS)]
    reasons = sorted({f"`{x['kernel']}`: {x['reason']}." for x in launches if x["reason"]})
    if reasons:
        lines += ["", "Above 1.2 and 1.3 with a reason: " + " ".join(reasons)]
    notes = sorted({**EXPERIMENTAL, **SWITCHED}.items())
    lines += ["", *(f"`{name}`: {why}." for name, why in notes)]
    lines += operators_table(load(OPERATORS))
    return "\n" + "\n".join(lines) + "\n\n"


def ratio(times: Mapping[str, Any]) -> str:
    """A rival's time over pydense's, or why there is none."""
    return f"{times['rival'] / times['call']:.2f}x" if "rival" in times else times.get("error", "")


def operators_table(measured: Mapping[str, Any]) -> list[str]:
    """Operators as users call them, where a GPU has measured them."""
    if not measured:
        return []
    title = f"Whole operators on {measured['card']}, commit {measured['commit']}, channels_last:"
    lines = ["", title, "", "| operator | pydense | torch / pydense | torch.compile / pydense |"]
    lines.append("|---|--:|--:|--:|")
    for name, times in measured["operators"].items():
        own = f"{1e6 * times['call']:.1f} us" if "call" in times else ""
        lines.append(f"| {name} | {own} | {ratio(times)} | {ratio(times.get('compiled', {}))} |")
    return lines


def document(text: str, launches: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> str:
    """benchmarks/README.md with the list of today.

    Raises:
        ValueError: A kernel was not counted, or the document has no place for the list.
    """
    listed = {launch["kernel"] for launch in launches}
    if unknown := sorted(set(kernels()) ^ listed ^ set(EXPERIMENTAL)):
        raise ValueError(
            f"cuda_kernels: the kernels in csrc and those counted must be the same, differ in "
            f"{', '.join(unknown)}: give it a simt::counted in tests/simt, then --count"
        )
    if len(BLOCK.findall(text)) != 1:
        raise ValueError("cuda_kernels: benchmarks/README.md must have one cuda-kernels block")
    return BLOCK.sub(lambda m: m[1] + table(launches, measured) + m[2], text)


def load(path: Path) -> Any:
    """A JSON file, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(path: Path, value: Any) -> None:
    """Writes a JSON file; whoever ends this finds the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def changed(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """Kernels whose counts differ; instructions may, because they depend on the compiler."""

    def counts(launches: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            f"{x['kernel']} at {x['shape']}": {k: v for k, v in x.items() if k != "instructions"}
            for x in launches
        }

    before, after = counts(old), counts(new)
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def measure(path: Path, twins: bool = False) -> None:
    """Times every kernel on the current GPU; writes them with the prediction beside them.

    Args:
        path: The file.
        twins: Adds to it the kernels that the shim cannot run, in a process of their own: they
            have never run anywhere, and what one of them breaks stays broken.
    """
    from benchmarks._cuda_measure import add_operators, measure_all
    from benchmarks._cuda_operators import TWIN_OPERATORS

    predicted = {f"{x['kernel']}|{x['shape']}": predict(x)[0] for x in load(COUNTS)}
    # What users would wait for first, should time be short; what has never run last.
    order = sorted(predicted, key=lambda key: (key.split("|")[0] in SWITCHED, key not in CUDNN))
    if twins:
        predicted, order = TWINS, list(TWINS)

    def keep(results: dict[str, Any]) -> None:
        for key in set(results["kernels"]) & set(predicted):
            results["kernels"][key]["predicted"] = predicted[key]
        save(path, results)

    old = load(path) if twins else None
    wanted = [(kernel, shape) for kernel, _, shape in (key.partition("|") for key in order)]
    results = measure_all(wanted, keep, old)
    if twins:
        add_operators(TWIN_OPERATORS, results, lambda: save(path, results))


def measure_compiled(path: Path) -> None:
    """Adds whole operators and the times of torch.compile to what :func:`measure` wrote."""
    from benchmarks._cuda_measure import add_compiled, add_operators
    from benchmarks._cuda_operators import OPERATORS as MADE

    results = load(path)
    add_operators(MADE, results, lambda: save(path, results))
    add_compiled(MADE, results, lambda: save(path, results))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_kernels")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--count", type=Path, metavar="BUILD", help="a build with PYDENSE_SIMT=ON")
    what.add_argument("--verify", type=Path, metavar="BUILD", help="compare the counts with it")
    what.add_argument("--adopt", type=Path, metavar="FILE", help="kernels.json of verify_gpu.sh")
    what.add_argument("--measure", type=Path, metavar="FILE", help="time the kernels on a GPU")
    what.add_argument(
        "--measure-compiled", type=Path, metavar="FILE", help="add operators and torch.compile"
    )
    what.add_argument(
        "--measure-twins", type=Path, metavar="FILE", help="add what has never run to FILE"
    )
    what.add_argument("--check", action="store_true", help="only tell whether the list is current")
    options = parser.parse_args(arguments)
    if options.measure:
        measure(options.measure)
        return 0
    if options.measure_twins:
        measure(options.measure_twins, twins=True)
        return 0
    if options.measure_compiled:
        measure_compiled(options.measure_compiled)
        return 0
    if options.verify:
        for name in (differing := changed(load(COUNTS), count(options.verify))):
            print(f"cuda_kernels: the counts of {name} have changed: run --count")
        return 1 if differing else 0
    if options.count:
        save(COUNTS, sorted(count(options.count), key=lambda x: (x["kernel"], x["shape"])))
    if options.adopt:
        adopted = load(options.adopt)
        save(GPU, {**load(GPU), **adopted["kernels"]})
        if "operators" in adopted:
            save(OPERATORS, {key: adopted[key] for key in ("card", "commit", "operators")})
    old = DOCUMENT.read_text(encoding="utf-8")
    try:
        new = document(old, load(COUNTS) or [], load(GPU))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.check:
        if old != new:
            print(f"{H200} list of kernels: out of date, run python -m benchmarks.cuda_kernels")
        return 1 if old != new else 0
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
