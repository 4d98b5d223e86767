"""A chart of the report: fidelity (PSNR) against perception (LPIPS or DISTS), as SVG.

Every method is a point. The points of one result that differ by the number of steps alone are joined by a line, and so
are those that differ by the dial `strength` alone.
"""

from __future__ import annotations

import html

from teasr.evaluation.registry import METRICS
from teasr.evaluation.report import Result, header
from teasr.evaluation.report_chart import HEIGHT, WIDTH
from teasr.evaluation.report_plane import colored, lines_of, plane

FIDELITY, PERCEPTION = "psnr", ("lpips", "dists")


def trade(metric: str, found: list[Result]) -> str:
    """Return a figure of this metric against PSNR; it is empty with fewer than two methods that have both."""
    lines = lines_of({result.name: result.scores["methods"] for result in found}, FIDELITY, metric)
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
