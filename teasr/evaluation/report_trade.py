"""A chart of the report: fidelity (PSNR) against perception (LPIPS or DISTS), as SVG.

Every method is a point. The points of one result that differ by the number of steps alone are joined by a line, and so
are those that differ by the dial `strength` alone.
"""

from __future__ import annotations

import html

from teasr.evaluation.names import BASELINES, dial_of, step_name, steps_of
from teasr.evaluation.registry import METRICS
from teasr.evaluation.report import Result, header
from teasr.evaluation.report_chart import HEIGHT, WIDTH
from teasr.evaluation.report_plane import Lines, Point, colored, plane

FIDELITY, PERCEPTION = "psnr", ("lpips", "dists")


def trade(metric: str, found: list[Result]) -> str:
    """Return a figure of this metric against PSNR; it is empty with fewer than two methods that have both."""
    lines = _lines(metric, found)
    if len({(p.x, p.y) for line in lines.values() for p in line}) < 2:
        return ""
    keys = (f'<span><i style="background:{color}"></i>{html.escape(name)}</span>' for name, color in colored(lines))
    what = f"{METRICS[metric].label} against {METRICS[FIDELITY].label}"
    return (
        f"<figure class=chart><figcaption><b>{header(metric)}</b> against {header(FIDELITY)}: perception against "
        f'fidelity; {METRICS[metric].better} and further right is better</figcaption><svg viewBox="0 0 {WIDTH} '
        f'{HEIGHT}" role="img" aria-label="{what}">{plane(lines, FIDELITY, metric)}</svg>'
        f"<p class=legend>{''.join(keys)}</p></figure>"
    )


def _lines(metric: str, found: list[Result]) -> Lines:
    """Return the points of every line by its name in the legend; the baseline, which all results share, comes once."""
    lines: Lines = {}
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
            if not (method in BASELINES and name in lines):
                point = Point(order, label, method, row[FIDELITY]["mean"], row[metric]["mean"])
                lines.setdefault(name, []).append(point)
    return lines
