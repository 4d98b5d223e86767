"""A chart of the report: a metric over the number of steps, as SVG."""

from __future__ import annotations

import html
import math

from teasr.evaluation.names import steps_of
from teasr.evaluation.registry import METRICS
from teasr.evaluation.report import Result, baseline_of, header

COLORS = (  # readable on white and on black
    *("#4477cc", "#d1603d", "#2a9d6f", "#8e4ec6", "#b58900", "#c2185b"),
    *("#00909e", "#7a8a00", "#9a6a4f", "#d06fb0", "#7f7f7f", "#5f6fb0", "#4f8f3a"),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 54, 14, 12, 38  # in px
TICKS, LABEL_PX = 5, 20  # most ticks of the y axis; least distance of two labels of the x axis
Points = list[tuple[int, dict[str, float]]]  # number of steps, and mean, low and high


def ticks(low: float, high: float, most: int = TICKS) -> list[float]:
    """Return round numbers (1, 2, 2.5 or 5 times a power of ten apart) between low and high."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= least * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def digits(values: list[float]) -> int:
    """Return the number of decimals that tells the values apart and shows each exactly."""
    return next((n for n in range(6) if all(abs(round(v, n) - v) < 1e-9 * max(1, abs(v)) for v in values)), 6)


def chart(metric: str, found: list[Result]) -> str:
    """Return a figure of a metric against the number of steps with its 95 % interval; the baseline is a dashed line.

    The result is empty when no method has a number of steps.
    """
    lines = [(result.name, points) for result in found if (points := _points(result, metric))]
    if not lines:
        return ""
    baseline = baseline_of(found[0].scores)
    base = found[0].scores["methods"].get(baseline, {}).get(metric, {}).get("mean")
    values = [v for _, points in lines for _, p in points for v in (p.get("low", p["mean"]), p.get("high", p["mean"]))]
    if base is not None:
        values.append(base)
    axes = Axes(values, sorted({s for _, points in lines for s, _ in points}))
    parts, right = [axes.drawn()], WIDTH - RIGHT
    if base is not None:
        y, (x, anchor) = axes.y(base), _clear_end(base, [points for _, points in lines])
        parts.append(f'<line class="base" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="halo" x="{x}" y="{y - 5}" text-anchor="{anchor}">{baseline}</text>')
    colored = [(name, points, COLORS[i % len(COLORS)]) for i, (name, points) in enumerate(lines)]
    parts += [_curve(axes, name, points, color) for name, points, color in colored]
    keys = (f'<span><i style="background:{color}"></i>{html.escape(name)}</span>' for name, _, color in colored)
    label, better = METRICS[metric].label, METRICS[metric].better
    return (
        f"<figure class=chart><figcaption><b>{header(metric)}</b> over the number of steps; {better} is better"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label} over the number of steps">'
        f"{''.join(parts)}</svg><p class=legend>{''.join(keys)}</p></figure>"
    )


def _clear_end(base: float, lines: list[Points]) -> tuple[int, str]:
    """Return where the label of the baseline stands and its anchor: at the end that is further from the curves."""
    first, last = (min(abs(points[end][1]["mean"] - base) for points in lines) for end in (0, -1))
    return (LEFT, "start") if first > last else (WIDTH - RIGHT, "end")


def _points(result: Result, metric: str) -> Points:
    rows = result.scores["methods"].items()
    return sorted(((s, row[metric]) for m, row in rows if (s := steps_of(m)) and metric in row), key=lambda p: p[0])


class Axes:
    """Where values lie in the chart: numbers of steps on a logarithmic axis, metrics on a linear one."""

    title = "steps"

    def __init__(self, values: list[float], steps: list[int]):
        low, high = min(values), max(values)
        margin = 0.08 * (high - low or abs(high) or 1)
        self.low, self.high, self.steps = low - margin, high + margin, steps

    def x(self, steps: int) -> float:
        """Place of a number of steps, in px."""
        span = math.log2(self.steps[-1] / self.steps[0]) or 1
        return round(LEFT + 14 + (WIDTH - LEFT - RIGHT - 28) * math.log2(steps / self.steps[0]) / span, 1)

    def y(self, value: float) -> float:
        """Place of a metric's value, in px."""
        return round(TOP + (HEIGHT - BOTTOM - TOP) * (self.high - value) / (self.high - self.low), 1)

    def drawn(self) -> str:
        """Grid, labels of both axes, and what the x axis shows."""
        parts, marks = [], ticks(self.low, self.high)
        for value in marks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{value:.{digits(marks)}f}</text>')
        middle, title = (LEFT + WIDTH) / 2, self.title
        return f'{"".join(parts)}{self._along()}<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{title}</text>'

    def _along(self) -> str:
        """Labels of the x axis."""
        parts, last = [], -math.inf
        for steps in self.steps:
            if self.x(steps) - last >= LABEL_PX:
                last = self.x(steps)
                parts.append(f'<text x="{last}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{steps}</text>')
        return "".join(parts)


def _curve(axes: Axes, name: str, points: Points, color: str) -> str:
    upper = [f"{axes.x(s)},{axes.y(p.get('high', p['mean']))}" for s, p in points]
    lower = [f"{axes.x(s)},{axes.y(p.get('low', p['mean']))}" for s, p in reversed(points)]
    path = " ".join(f"{axes.x(s)},{axes.y(p['mean'])}" for s, p in points)
    parts = [f'<polygon points="{" ".join(upper + lower)}" fill="{color}" opacity="0.16"/>']
    parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
    for s, p in points:
        interval = f", 95 % interval {p['low']:.4g} to {p['high']:.4g}" if "low" in p else ""
        told = f"{html.escape(name)}, {s} step{'s' * (s > 1)}: {p['mean']:.4g}{interval}"
        dot = f'<circle cx="{axes.x(s)}" cy="{axes.y(p["mean"])}" r="4" fill="{color}">'
        parts.append(f"{dot}<title>{told}</title></circle>")
    return "".join(parts)
