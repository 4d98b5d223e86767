"""A chart of the report: fidelity (PSNR) against perception (LPIPS or DISTS), as SVG.

Every method is a point. The points of one result that differ by the number of steps alone are joined by a line, and so
are those that differ by the dial `strength` alone.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from teasr.evaluation.names import BASELINES, dial_of, step_name, steps_of
from teasr.evaluation.registry import METRICS
from teasr.evaluation.report import Result, cell, header
from teasr.evaluation.report_chart import BOTTOM, COLORS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, digits, ticks

FIDELITY, PERCEPTION = "psnr", ("lpips", "dists")
LINE_PX, LETTER_PX = 12, 6.5  # size of a label of a point
GAP_PX, DOT_PX = 7, 4  # between a point and its label; radius of a point


@dataclass(frozen=True)
class Point:
    """A method in the chart; order: its place on the line; label: what is written beside it."""

    order: float
    label: str
    method: str
    x: float
    y: float


def trade(metric: str, found: list[Result]) -> str:
    """Return a figure of this metric against PSNR; it is empty with fewer than two methods that have both."""
    curves = _curves(metric, found)
    points = [p for line in curves.values() for p in line]
    if len({(p.x, p.y) for p in points}) < 2:
        return ""
    axes = _Plane([p.x for p in points], [p.y for p in points])
    taken = [(axes.x(p.x) - DOT_PX, axes.y(p.y) - DOT_PX, axes.x(p.x) + DOT_PX, axes.y(p.y) + DOT_PX) for p in points]
    parts, keys = [axes.drawn()], []
    for i, (name, line) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        parts.append(_drawn(axes, name, sorted(line, key=lambda p: p.order), metric, color))
        keys.append(f'<span><i style="background:{color}"></i>{html.escape(name)}</span>')
    parts += [_labelled(axes, p, taken) for p in points]  # above all lines
    what = f"{METRICS[metric].label} against {METRICS[FIDELITY].label}"
    return (
        f"<figure class=chart><figcaption><b>{header(metric)}</b> against {header(FIDELITY)}: perception against "
        f'fidelity; {METRICS[metric].better} and further right is better</figcaption><svg viewBox="0 0 {WIDTH} '
        f'{HEIGHT}" role="img" aria-label="{what}">{"".join(parts)}</svg><p class=legend>{"".join(keys)}</p></figure>'
    )


def _curves(metric: str, found: list[Result]) -> dict[str, list[Point]]:
    """Return the points of every line by its name in the legend; the baseline, which all results share, comes once."""
    curves: dict[str, list[Point]] = {}
    for result in found:
        for method, row in result.scores["methods"].items():
            if metric not in row or FIDELITY not in row:
                continue
            name, order, label = f"{result.name}, {method}", 0.0, method
            if method in BASELINES:
                name = method
            elif dial := dial_of(method):
                name = f"{result.name}, strength of {step_name(dial[0])}"
                order, label = dial[1], f"{dial[1]:g}"
            elif steps := steps_of(method):
                name, order, label = f"{result.name}, steps", steps, f"{steps}"
            if not (method in BASELINES and name in curves):
                point = Point(order, label, method, row[FIDELITY]["mean"], row[metric]["mean"])
                curves.setdefault(name, []).append(point)
    return curves


class _Plane(Axes):
    """Two linear axes."""

    title = f"{METRICS[FIDELITY].label}, dB"

    def __init__(self, xs: list[float], ys: list[float]):
        super().__init__(ys, [])
        margin = 0.08 * (max(xs) - min(xs) or abs(max(xs)) or 1)
        self.left, self.right = min(xs) - margin, max(xs) + margin

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / (self.right - self.left), 1)

    def _along(self) -> str:
        marks, parts = ticks(self.left, self.right), []
        for value in marks:
            x, text = self.x(value), f"{value:.{digits(marks)}f}"
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
        return "".join(parts)


def _drawn(axes: _Plane, name: str, line: list[Point], metric: str, color: str) -> str:
    path = " ".join(f"{axes.x(p.x)},{axes.y(p.y)}" for p in line)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>' if len(line) > 1 else ""]
    for p in line:
        scores = f"{METRICS[FIDELITY].label} {cell(FIDELITY, {FIDELITY: p.x})}, {METRICS[metric].label} "
        told = html.escape(f"{name}: {p.method}, {scores}{cell(metric, {metric: p.y})}")
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
