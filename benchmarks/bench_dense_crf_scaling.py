# SPDX-License-Identifier: Apache-2.0
"""How the time of the dense CRF grows with pixels, labels and images: it should be in proportion.

    python -m benchmarks.bench_dense_crf_scaling          # writes results/dense_crf_scaling.json
    python -m benchmarks.bench_dense_crf_scaling --quick  # seconds; writes nothing

Everything is a cold call of ``pydense.nn.DenseCRF`` with pydensecrf's default parameters and ten
iterations. Sizes take turns within each round, and what is kept is the ratio to the smallest size
in the same round, so that a slow moment of the machine does not bend the line. More pixels are more
of a mosaic of one photo and its mirror images, at the same resolution: a photo that is enlarged has
more pixels but hardly more lattice vertices.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._crf_cases import ITERATIONS, PARAMETERS, load_picture, make_unary
from benchmarks._crf_rivals import clear_cache, torch_layer
from benchmarks._harness import Case, Rival, run_cases
from benchmarks._machine import available_cpus, commit, describe
from benchmarks._result import make_result, write_result
from benchmarks._scaling_report import growth

NAME = "dense_crf_scaling"
TITLE = (
    f"Time of pydense.nn.DenseCRF, cold, {ITERATIONS} iterations, default parameters, against the "
    "size of the problem"
)
PHOTO = ("coffee", 400, 600)

# Height, width, labels, images by axis; the values of the axis double from entry to entry.
Size = tuple[int, int, int, int]
AXES: Mapping[str, Sequence[Size]] = {
    "pixels": [
        (height, width, 21, 1)
        for height, width in (
            (200, 300),
            (283, 424),
            (400, 600),
            (566, 848),
            (800, 1200),
            (1131, 1697),
        )
    ],
    "labels": [(321, 481, labels, 1) for labels in (4, 8, 16, 32, 64, 128)],
    "images": [(160, 240, 21, images) for images in (1, 2, 4, 8, 16, 32)],
}
QUICK: Mapping[str, Sequence[Size]] = {
    "pixels": [(20, 30, 3, 1), (40, 60, 3, 1)],
    "labels": [(20, 30, labels, 1) for labels in (2, 4, 8)],
    "images": [(20, 30, 3, images) for images in (1, 2)],
}


def value_of(axis: str, size: Size) -> int:
    """What grows along an axis."""
    height, width, labels, images = size
    return {"pixels": height * width, "labels": labels, "images": images}[axis]


def mosaic(height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3): the photo, mirrored at its edges as often as it takes."""
    photo = load_picture(*PHOTO)

    def fold(count: int, size: int) -> NDArray[np.intp]:
        at = np.arange(count) % (2 * size)
        return np.minimum(at, 2 * size - 1 - at)

    return photo[fold(height, PHOTO[1])][:, fold(width, PHOTO[2])]


def call_of(size: Size) -> Callable[[], torch.Tensor]:
    """A call of the layer on a problem of this size."""
    height, width, labels, images = size
    image = torch.from_numpy(mosaic(height, width)).permute(2, 0, 1)[None]
    unary = torch.from_numpy(make_unary(height, width, labels))
    logits = -unary.view(1, labels, height, width)
    return torch_layer(
        logits.expand(images, -1, -1, -1).contiguous(),
        image.expand(images, -1, -1, -1).contiguous(),
        PARAMETERS["default"],
    )


def case_of(axis: str, sizes: Sequence[Size]) -> Case:
    """One axis: each size is a rival, the smallest is the subject."""
    values = [value_of(axis, size) for size in sizes]

    def setup() -> Mapping[str, Rival]:
        return {str(v): call_of(size) for v, size in zip(values, sizes, strict=True)}

    names = ("height", "width", "labels", "images")
    return Case(
        name=axis,
        setup=setup,
        subject=str(values[0]),
        params={"values": values, "sizes": [dict(zip(names, s, strict=True)) for s in sizes]},
        before={str(v): clear_cache for v in values},
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its result; writes it unless only a part was run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_dense_crf_scaling",
        description="Time of the dense CRF against pixels, labels and images.",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, available_cpus()}))
    parser.add_argument("--rounds", type=int, help="default 7, quick 2")
    parser.add_argument("--axis", choices=sorted(AXES), nargs="+", default=list(AXES))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"result file (default benchmarks/results/{NAME}.json, none with --quick or --axis)",
    )
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    rounds = options.rounds or (2 if options.quick else 7)

    import pydense

    sizes = QUICK if options.quick else AXES
    runs = run_cases(
        [case_of(axis, sizes[axis]) for axis in options.axis],
        rounds=rounds,
        threads=options.threads,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    built = pydense.build_info()
    for run in runs:
        run["isa"] = built["cpu_capability"]
        figures = growth(run)
        print(
            f"{run['case']}, {run['threads']} thread(s): time ~ size^{figures.slope:.3f}; "
            f"at most {figures.off_line:.1%} off a straight line"
        )
    machine = describe(("torch", "numpy", "scikit-image"))
    machine["packages"] = {"pydense": built["version"], **machine["packages"]}
    shown = ["--threads", *map(str, options.threads), "--rounds", str(rounds)]
    shown += ["--quick"] * options.quick
    if options.axis != list(AXES):
        shown += ["--axis", *options.axis]
    result = make_result(
        NAME,
        TITLE,
        runs=runs,
        machine=machine,
        peaks={},
        command=shlex.join(["python", "-m", "benchmarks.bench_dense_crf_scaling", *shown]),
        commit=commit(),
        kind="scaling",
    )
    if options.output or not (options.quick or options.axis != list(AXES)):
        print(f"wrote {write_result(result, options.output).name}", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
