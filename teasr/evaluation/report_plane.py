"""Methods in the plane of two metrics, as SVG: every method is a point, and the points of one line are joined."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

from teasr.evaluation.names import BASELINES, dial_of, step_name, steps_of
from teasr.evaluation.registry import METRICS
from teasr.evaluation.report import cell
from teasr.evaluation.report_chart import BOTTOM, COLORS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, digits, ticks

LINE_PX, LETTER_PX = 12, 6.5  # size of a label of a point
GAP_PX, DOT_PX = 7, 4  # between a point and its label; radius of a point


@dataclass(frozen=True)
class Point:
    """A method in the plane; order: its place on the line; label: what is written beside it."""

    order: float
    label: str
    method: str
    x: float
    y: float


Lines = dict[str, list[Point]]  # points by the name of their line in the legend


def lines_of(results: Mapping[str, Mapping], x: str, y: str) -> Lines:
    """Return the points of the results that have both metrics; results: the `methods` of scores.json by name.

    The numbers of steps of a result are one line, and so are the values of its dial; the baseline, which all results
    share, comes once.
    """
    lines: Lines = {}
    for result, methods in results.items():
        for method, row in methods.items():
            if x not in row or y not in row:
                continue
            name, order, label = f"{result}, {method}", 0.0, method
            if method in BASELINES:
                name = method
            elif dial := dial_of(method):
                name = f"{result}, strength of {step_name(dial[0])}"
                order, label = dial[1], f"{dial[1]:g}"
            elif steps := steps_of(method):
                name, order, label = f"{result}, steps", steps, f"{steps}"
            if not (method in BASELINES and name in lines):
                lines.setdefault(name, []).append(Point(order, label, method, row[x]["mean"], row[y]["mean"]))
    return lines


def plane(lines: Lines, x: str, y: str) -> str:
    """Return the inside of an SVG of WIDTH x HEIGHT px; x and y: the names of the metrics to the right and upwards."""
    points = [p for line in lines.values() for p in line]
    axes = _Plane([p.x for p in points], [p.y for p in points], METRICS[x].label)
    taken = [(axes.x(p.x) - DOT_PX, axes.y(p.y) - DOT_PX, axes.x(p.x) + DOT_PX, axes.y(p.y) + DOT_PX) for p in points]
    curves = [_drawn(axes, name, lines[name], (x, y), color) for name, color in colored(lines)]
    return "".join([axes.drawn(), *curves, *(_labelled(axes, p, taken) for p in points)])  # labels above all lines


def colored(lines: Lines) -> list[tuple[str, str]]:
    """Return the name and the colour of every line."""
    return [(name, COLORS[i % len(COLORS)]) for i, name in enumerate(lines)]


class _Plane(Axes):
    """Two linear axes."""

    def __init__(self, xs: list[float], ys: list[float], title: str):
        super().__init__(ys, [])
        margin = 0.08 * (max(xs) - min(xs) or abs(max(xs)) or 1)
        self.left, self.right, self.title = min(xs) - margin, max(xs) + margin, title

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / (self.right - self.left), 1)

    def _along(self) -> str:
        marks, parts = ticks(self.left, self.right), []
        for value in marks:
            x, text = self.x(value), f"{value:.{digits(marks)}f}"
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
        return "".join(parts)


def _drawn(axes: _Plane, name: str, line: list[Point], metrics: tuple[str, str], color: str) -> str:
    line = sorted(line, key=lambda p: p.order)
    path = " ".join(f"{axes.x(p.x)},{axes.y(p.y)}" for p in line)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>' if len(line) > 1 else ""]
    for p in line:
        scores = (f"{METRICS[m].label} {cell(m, {m: value})}" for m, value in zip(metrics, (p.x, p.y), strict=True))
        told = html.escape(", ".join(dict.fromkeys((name, p.method, *scores))))
        dot = f'<circle cx="{axes.x(p.x)}" cy="{axes.y(p.y)}" r="{DOT_PX}" fill="{color}">'
        parts.append(f"{dot}<title>{told}</title></circle>")
    return "".join(parts)


def _labelled(axes: _Plane, point: Point, taken: list[tuple[float, float, float, float]]) -> str:
    """Write the label of a point at the first of four places where it hides no other; without room it is left out."""
    x, y, width = axes.x(point.x), axes.y(point.y), LETTER_PX * len(point.label)
    for right, below in ((True, False), (False, False), (True, True), (False, True)):
        left, top = (x + GAP_PX if right else x - GAP_PX - width), (y if below else y - LINE_PX)
        box = (left, top, left + width, top + LINE_PX)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return f'<text class="halo" x="{left:.1f}" y="{top + LINE_PX - 2:.1f}">{html.escape(point.label)}</text>'
    return ""


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes (left, top, right, bottom) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
