# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of results of the kind ``scaling``: time against size, relative to the smallest.

The plot is written as SVG text, so that the same result gives the same bytes everywhere and
``report --check`` can compare them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks._harness import TOTAL

Run = Mapping[str, Any]

COLOURS = ("#1b6ca8", "#c0392b", "#2e7d32", "#8e44ad")
LEFT, TOP, SIDE, WIDTH, HEIGHT = 64, 24, 300, 560, 380


@dataclass(frozen=True)
class Growth:
    """How time grows along an axis.

    Attributes:
        sizes: Sizes / the smallest.
        times: Median of time / time of the smallest in the same round.
        slope: Of log time over log size, by least squares: 1 is proportional.
        last_slope: The same of the last two points, where fixed costs matter least.
        off_line: Largest deviation from the best straight line a + b size, relative to the time.
    """

    sizes: Sequence[float]
    times: Sequence[float]
    slope: float
    last_slope: float
    off_line: float


def growth(run: Run) -> Growth:
    """The growth along the axis of a run."""
    values = run["params"]["values"]
    sizes = np.array(values, float) / values[0]
    medians = [run["ratios"][str(value)][TOTAL]["median"] for value in values[1:]]
    times = np.array([1.0, *medians])
    logs = np.log(sizes), np.log(times)
    # Weights 1 / time: the fit is to minimise relative errors.
    line = np.polyfit(sizes, times, 1, w=1 / times) if len(sizes) > 2 else None
    off = 0.0 if line is None else float(np.abs(np.polyval(line, sizes) / times - 1).max())
    return Growth(
        sizes=sizes.tolist(),
        times=times.tolist(),
        slope=float(np.polyfit(*logs, 1)[0]),
        last_slope=float((logs[1][-1] - logs[1][-2]) / (logs[0][-1] - logs[0][-2])),
        off_line=off,
    )


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per axis and thread count, under :data:`HEADER`."""
    found = []
    for run in result["runs"]:
        values, g = run["params"]["values"], growth(run)
        seconds = run["rivals"]
        ends = [seconds[str(v)]["seconds"][TOTAL]["median"] * 1e3 for v in (values[0], values[-1])]
        found.append(
            [
                run["case"],
                str(run["threads"]),
                f"{values[0]} to {values[-1]}",
                f"{ends[0]:.1f} to {ends[1]:.1f}",
                f"{g.sizes[-1]:.1f}x",
                f"{g.times[-1]:.1f}x",
                f"{g.slope:.3f}",
                f"{g.last_slope:.3f}",
                f"{100 * g.off_line:.1f} %",
            ]
        )
    return found


HEADER = (
    "axis", "threads", "from, to", "ms", "size", "time", "log-log slope", "last step's slope",
    "off a straight line",
)  # fmt: skip


def plot(result: Mapping[str, Any]) -> str:
    """Log-log plot of the runs with the fewest threads, as SVG."""
    threads = min(run["threads"] for run in result["runs"])
    curves = {run["case"]: growth(run) for run in result["runs"] if run["threads"] == threads}
    largest = max(max(*g.sizes, *g.times) for g in curves.values())
    octaves = math.ceil(math.log2(largest) - 1e-9)
    step = SIDE / octaves

    def x(size: float) -> str:
        return f"{LEFT + math.log2(size) * step:.1f}"

    def y(time: float) -> str:
        return f"{TOP + SIDE - math.log2(time) * step:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{_escape(result['title'])}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    end = 2.0**octaves
    for octave in range(octaves + 1):
        value = 2.0**octave
        parts.append(
            f'<path d="M{x(value)} {y(1)}V{y(end)}M{x(1)} {y(value)}H{x(end)}" '
            'stroke="#dddddd" fill="none"/>'
        )
        parts.append(_text(x(value), float(y(1)) + 18, f"{value:g}", "middle"))
        parts.append(_text(LEFT - 8, float(y(value)) + 4, f"{value:g}", "end"))
    parts.append(
        f'<path d="M{x(1)} {y(1)}L{x(end)} {y(end)}" stroke="#888888" '
        'stroke-dasharray="5 4" fill="none"/>'
    )
    parts.append(_text(LEFT + SIDE / 2, TOP + SIDE + 40, "size / smallest size", "middle"))
    parts.append(
        f'<text transform="translate(20 {TOP + SIDE / 2:.0f}) rotate(-90)" '
        'text-anchor="middle">time / time of the smallest</text>'
    )
    legend = LEFT + SIDE + 20
    for index, (axis, g) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = [(x(size), y(time)) for size, time in zip(g.sizes, g.times, strict=True)]
        line = " ".join(f"{a},{b}" for a, b in points)
        parts.append(f'<polyline points="{line}" stroke="{colour}" stroke-width="2" fill="none"/>')
        parts += [f'<circle cx="{a}" cy="{b}" r="3" fill="{colour}"/>' for a, b in points]
        at = TOP + 12 + 20 * index
        parts.append(f'<circle cx="{legend}" cy="{at - 4}" r="4" fill="{colour}"/>')
        parts.append(_text(legend + 10, at, f"{axis}: slope {g.slope:.2f}"))
    at = TOP + 12 + 20 * len(curves)
    parts.append(_text(legend - 4, at, "dashed: proportional"))
    plural = "" if threads == 1 else "s"
    parts.append(_text(legend - 4, at + 20, f"{threads} thread{plural}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float | str, y: float, text: str, anchor: str = "start") -> str:
    at = f"{float(x):.1f}"
    return f'<text x="{at}" y="{y:.1f}" text-anchor="{anchor}">{_escape(text)}</text>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
