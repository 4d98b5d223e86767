"""Draw methods in the plane of two metrics: the dial of TADSR as a curve, other methods and step counts as points.

    python eval/chart.py --curves runs/dial/ablation.json --points runs/comparison/comparison.json --out docs/dial.svg

--curves: results of `eval/ablate.py --strengths ..`, a curve for each row; --points: those of `eval/compare.py`, the
rows with equal updates. Every place is the mean over seeds.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from teasr.evaluation.names import BASELINES
from teasr.evaluation.registry import METRICS
from teasr.evaluation.report_chart import COLORS, digits, ticks
from teasr.util import command_line
from teasr.util.files import write_atomic

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 420, 60, 130, 16, 46  # in px
STYLE = (
    "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd}.halo{paint-order:stroke;stroke:#fff;stroke-width:3px}"
    "polyline{fill:none;stroke-width:2}"
)
Place = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A name, and places with their labels: one place is drawn as a point, several as a curve."""

    name: str
    places: list[Place]
    labels: list[str]


def main(arguments: list[str] | None = None) -> int:
    """Draw the chart; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, help="ablation.json of eval/ablate.py with --strengths")
    parser.add_argument("--points", type=Path, help="comparison.json of eval/compare.py")
    parser.add_argument("--x", choices=tuple(METRICS), default="psnr", help="metric to the right (default: psnr)")
    parser.add_argument("--y", choices=tuple(METRICS), default="dists", help="metric upwards (default: dists)")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    options = parser.parse_args(arguments)
    return command_line.run("drawing", lambda: _draw(options), "run the same command again")


def _draw(options: argparse.Namespace) -> None:
    metrics = (options.x, options.y)
    lines = curves(json.loads(options.curves.read_text()), metrics) if options.curves else []
    lines += points(json.loads(options.points.read_text()), metrics) if options.points else []
    if not lines:
        raise ValueError("nothing to draw: give --curves, --points or both")
    write_atomic(options.out, chart(lines, metrics).encode())
    print(options.out)


def curves(result: dict, metrics: tuple[str, str]) -> list[Line]:
    """Return a curve for each row of an ablation with strengths."""
    found = []
    for name, methods in result["rows"].items():
        at = {m.split(" at ")[1]: row for m, row in methods.items() if " at " in m}
        if at:
            found.append(Line(name, [tuple(row[m]["mean"] for m in metrics) for row in at.values()], list(at)))
    return found


def points(result: dict, metrics: tuple[str, str]) -> list[Line]:
    """Return a point for each row of a comparison with equal updates, and for the baseline."""
    found = []
    for row in result["rows"]:
        if row.get("equal", "updates") == "updates":
            several = row["method"] not in BASELINES and not re.fullmatch("1 step.*", row["steps"])
            name = f"{row['method']}, {row['steps']}" if several else row["method"]
            found.append(Line(name, [tuple(statistics.mean(row["scores"][m]) for m in metrics)], [""]))
    return found


def chart(lines: list[Line], metrics: tuple[str, str]) -> str:
    """Return the chart as SVG, with the labels of a curve's ends; what is better lies to the right and upwards."""
    x, y = (_Axis([place[i] for line in lines for place in line.places], metrics[i], i) for i in (0, 1))
    parts = [_grid(x, 0, metrics[0]), _grid(y, 1, metrics[1])]
    for i, line in enumerate(lines):
        curve, at = len(line.places) > 1, [(x(a), y(b)) for a, b in line.places]
        color = COLORS[i % len(COLORS)] if curve else "#222"
        if curve:
            parts.append(f'<polyline stroke="{color}" points="{" ".join(f"{a},{b}" for a, b in at)}"/>')
        parts += [f'<circle cx="{a}" cy="{b}" r="{3 if curve else 5}" fill="{color}"/>' for a, b in at]
        for (a, b), label in ((at[0], line.labels[0]), (at[-1], line.labels[-1])) if curve else ():
            parts.append(f'<text class="halo" x="{a + 6}" y="{b - 5}" style="font-size:10px">{label}</text>')
        a, b = at[-1]
        parts.append(
            f'<text class="halo" x="{a + 8}" y="{b + 10}" style="fill:{color}">{html.escape(line.name)}</text>'
        )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    title = f"{METRICS[metrics[1]].label} over {METRICS[metrics[0]].label}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


class _Axis:
    """Maps the values of a metric to px, such that better values lie to the right (0) or upwards (1)."""

    def __init__(self, values: list[float], metric: str, direction: int):
        low, high = min(values), max(values)
        margin = 0.06 * (high - low or abs(high) or 1)
        self.low, self.high = low - margin, high + margin
        self.turned = not METRICS[metric].higher
        self.ends = ((LEFT, WIDTH - RIGHT), (HEIGHT - BOTTOM, TOP))[direction]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        a, b = reversed(self.ends) if self.turned else self.ends
        return round(a + (b - a) * share, 1)


def _grid(axis: _Axis, direction: int, metric: str) -> str:
    """Return the lines, the numbers and the name of an axis."""
    at, parts = ticks(axis.low, axis.high), []
    for value in at:
        p, text = axis(value), f"{value:.{digits(at)}f}"
        if direction == 0:
            parts.append(f'<line class="grid" x1="{p}" x2="{p}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{p}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
        else:
            parts.append(f'<line class="grid" y1="{p}" y2="{p}" x1="{LEFT}" x2="{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{p + 4}" text-anchor="end">{text}</text>')
    label = f"{METRICS[metric].label}, {METRICS[metric].better} is better"
    place = (
        f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}"'
        if direction == 0
        else f'transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    )
    return f'{"".join(parts)}<text {place} text-anchor="middle">{label}</text>'


if __name__ == "__main__":
    sys.exit(main())
