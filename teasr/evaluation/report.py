"""A report on several evaluations: our rows beside published ones, metrics over steps, before/after sliders."""

from __future__ import annotations

import base64
import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teasr.config import strict_yaml
from teasr.evaluation.names import BASELINES, BICUBIC, SHOWN, shown_name, steps_of
from teasr.evaluation.registry import METRICS
from teasr.util.files import read_json

COLORS = ("#3066be", "#d1603d", "#2a9d6f", "#8e4ec6", "#b58900", "#c2185b")
WIDTH, HEIGHT, LEFT, BOTTOM = 340, 220, 52, 34  # layout of a chart in px


@dataclass
class Result:
    """One evaluation, as stored in its result folder."""

    name: str
    folder: Path
    scores: dict
    speed: dict
    commit: str

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> Result:
        """Read a result folder. Raises ValueError when `folder` is not one."""
        try:
            scores = json.loads((folder / "scores.json").read_text())
            scores["methods"], scores["metrics"], scores["dataset"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{folder} contains no scores.json of `teasr benchmark`: give result folders such as RUN/eval/DATASET"
            ) from None
        speed = read_json(folder / "speed.json")
        run = folder.parent.parent.name if folder.parent.name == "eval" else folder.name
        return cls(name or run, folder, scores, speed, speed.get("commit", "unknown"))


def read_published(path: Path) -> list[dict]:
    """Read a file of published scores. Raises ValueError that names the file and the key."""
    blocks = strict_yaml.read_yaml(path, list)
    with strict_yaml.named(path):
        for i, block in enumerate(blocks):
            block = {"source": None, "protocol": None} | strict_yaml.convert(dict[str, Any], block, f"[{i}]")
            for key, value in block.items():
                kind = str if key in ("source", "protocol") else dict[str, dict[str, float]]
                strict_yaml.convert(kind, value, f"[{i}].{key}")
    return blocks


def by_dataset(results: list[Result]) -> dict[str, list[Result]]:
    """Group the results by data set, in order of first appearance."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.scores["dataset"], []).append(result)
    return found


def rows_of(dataset: str, results: list[Result], blocks: list[dict]) -> list[tuple[str, dict[str, float], str]]:
    """Return (name, metrics, source) of every row of a data set's table: our rows, then published ones.

    `source` is empty for our rows.
    """
    rows = []
    for result in results:
        for method, row in result.scores["methods"].items():
            name = method if method in BASELINES else f"{result.name}, {method}"
            values = {metric: value["mean"] for metric, value in row.items()}
            if (name, values, "") not in rows:
                rows.append((name, values, ""))
    protocols = {result.scores["protocol"] for result in results}
    for block in blocks:
        if block["protocol"] in protocols or block["protocol"] == "unknown":
            rows += [(name, values, block["source"]) for name, values in block.get(dataset, {}).items()]
    return rows


def columns_of(rows: list[tuple[str, dict[str, float], str]]) -> list[str]:
    """Return the metrics that at least one of our rows has."""
    return [m for m in METRICS if any(m in values for _, values, source in rows if not source)]


def cell(metric: str, values: dict[str, float]) -> str:
    """Format a number with the digits usual in papers, or a dash when it is missing."""
    digits = 2 if metric in ("psnr", "fid", "musiq", "niqe") else 4
    return f"{values[metric]:.{digits}f}" if metric in values else "–"


def delta(metric: str, values: dict[str, float], ours: dict[str, float]) -> str:
    """Format how much better (+) or worse (-) our row is than this one; empty when either lacks the metric."""
    if metric not in values or metric not in ours:
        return ""
    gain = METRICS[metric].merit(ours[metric]) - METRICS[metric].merit(values[metric])
    return f"{gain:+.{2 if metric in ('psnr', 'fid', 'musiq', 'niqe') else 4}f}"


def header(metric: str) -> str:
    """Return a metric's label with an arrow for its direction, or to its target."""
    return f"{METRICS[metric].label} {METRICS[metric].arrow}"


def baseline_of(scores: dict) -> str:
    """Return the name of the unrestored images in results; those of older versions do not state it."""
    return scores.get("baseline") or BICUBIC


def first_of(results: list[Result]) -> dict[str, float]:
    """Metrics of the row that published rows are compared with: the first method of the first result."""
    methods = results[0].scores["methods"]
    name = next((m for m in methods if m not in BASELINES), next(iter(methods)))
    return {metric: value["mean"] for metric, value in methods[name].items()}


def gains(results: list[Result]) -> list[str]:
    """Describe the gain over the unrestored images in the first metric, computed image by image."""
    lines = []
    for result in results:
        for method, row in result.scores["methods"].items():
            metric, values = next(iter(row.items()), ("", {}))
            if "gain_low" in values:
                mean, low, high = (values[f"gain_{k}"] for k in ("mean", "low", "high"))
                label = METRICS[metric].label
                lines.append(
                    f"{result.name}, {method}, gain over {baseline_of(result.scores)}: {mean:+.3f} {label}, "
                    f"95 % interval {low:+.3f} to {high:+.3f}"
                )
    return lines


def skipped(results: list[Result]) -> dict[str, str]:
    """Return the metrics that were not computed, each with its status, which names the fix."""
    return {
        METRICS[m].label: metric["status"]
        for result in results
        for m, metric in result.scores["metrics"].items()
        if metric["status"] != "ok"
    }


def markdown(results: list[Result], blocks: list[dict]) -> str:
    """Return the report as Markdown, with tables only."""
    lines = ["# Evaluation", ""]
    for dataset, found in by_dataset(results).items():
        scores = found[0].scores
        rows = rows_of(dataset, found, blocks)
        columns, ours = columns_of(rows), first_of(found)
        lines += [f"## {dataset}", "", f"{scores['pictures']} images, protocol {scores['protocol']}.", ""]
        lines += ["| | " + " | ".join(header(m) for m in columns) + " |", "|---|" + "---|" * len(columns)]
        for name, values, source in rows:
            cells = [cell(m, values) + (f" ({d})" if source and (d := delta(m, values, ours)) else "") for m in columns]
            lines.append(f"| {name}{' *' if source else ''} | " + " | ".join(cells) + " |")
        sources = list(dict.fromkeys(source for _, _, source in rows if source))
        lines += [
            "",
            *(
                f"\\* {source}. In brackets: gain of our first row over this row (positive: better)."
                for source in sources
            ),
        ]
        lines += [f"{line}." for line in gains(found)]
        lines += [f"{label} {status}." for label, status in skipped(found).items()]
        lines += [f"{r.name}: commit {r.commit}, {hardware(r)}." for r in found] + [""]
    return "\n".join(lines)


def hardware(result: Result) -> str:
    """Return the device and the seconds per image."""
    speed = result.speed.get("methods", {})
    seconds = ", ".join(f"{name} {times['seconds_median']:.3g} s" for name, times in speed.items())
    return f"{result.speed.get('device', 'unknown device')}" + (f"; time per image: {seconds}" if seconds else "")


def chart(metric: str, found: list[Result]) -> str:
    """Return an SVG chart of a metric against the number of steps, with its interval; the baseline is a dashed line.

    The result is empty when no method has a number of steps.
    """
    lines = []
    for result in found:
        points = [
            (steps, row[metric])
            for m, row in result.scores["methods"].items()
            if (steps := steps_of(m)) and metric in row
        ]
        if points:
            lines.append((result.name, sorted(points, key=lambda p: p[0])))
    if not lines:
        return ""
    values = [v for _, points in lines for _, p in points for v in (p.get("low", p["mean"]), p.get("high", p["mean"]))]
    baseline = baseline_of(found[0].scores)
    base = found[0].scores["methods"].get(baseline, {}).get(metric, {}).get("mean")
    low, high = min([*values, *([base] if base else [])]), max([*values, *([base] if base else [])])
    low, high = low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1)
    steps = sorted({s for _, points in lines for s, _ in points})
    span = math.log2(steps[-1] / steps[0]) or 1

    def x(s: float) -> float:
        return LEFT + 14 + (WIDTH - LEFT - 34) * math.log2(s / steps[0]) / span

    def y(v: float) -> float:
        return 12 + (HEIGHT - BOTTOM - 12) * (high - v) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{header(metric)} over the number of steps">']
    for i in range(4):
        v = low + (high - low) * (i + 0.5) / 4
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>')
    parts += [f'<text x="{x(s):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{s}</text>' for s in steps]
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 2}" text-anchor="middle">steps</text>')
    if base is not None:
        parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(base):.1f}" y2="{y(base):.1f}"/>')
        parts.append(f'<text x="{WIDTH - 12}" y="{y(base) - 4:.1f}" text-anchor="end">{baseline}</text>')
    for (_, points), color in zip(lines, COLORS * len(lines), strict=False):
        upper = [f"{x(s):.1f},{y(p.get('high', p['mean'])):.1f}" for s, p in points]
        lower = [f"{x(s):.1f},{y(p.get('low', p['mean'])):.1f}" for s, p in reversed(points)]
        parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{color}" opacity="0.14"/>')
        path = " ".join(f"{x(s):.1f},{y(p['mean']):.1f}" for s, p in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for s, p in points:
            dot = f'<circle cx="{x(s):.1f}" cy="{y(p["mean"]):.1f}" r="3.5" fill="{color}">'
            parts.append(f"{dot}<title>{s} steps: {p['mean']:.4g}</title></circle>")
    legend = "".join(
        f'<span><i style="background:{color}"></i>{html.escape(name)}</span>'
        for (name, _), color in zip(lines, COLORS * len(lines), strict=False)
    )
    return (
        f"<figure><figcaption>{header(metric)}</figcaption>{''.join(parts)}</svg><p class=legend>{legend}</p></figure>"
    )


def slider(folder: Path, methods: list[str]) -> str:
    """Return a slider over two versions of an image in `shown/`; both versions can be selected."""
    titles = [t for t in [*methods, "HQ"] if (folder / shown_name(t)).is_file()]
    if len(titles) < 2:
        return ""
    data = {t: base64.b64encode((folder / shown_name(t)).read_bytes()).decode() for t in titles}
    before, after = titles[0], titles[1]

    def choice(side: str, chosen: str) -> str:
        options = "".join(f"<option{' selected' if t == chosen else ''}>{html.escape(t)}</option>" for t in titles)
        return f'<select data-side="{side}" aria-label="{side}">{options}</select>'

    pictures = '<img class="after" alt="after"><img class="before" alt="before">'
    sources = html.escape(json.dumps({t: f"data:image/png;base64,{d}" for t, d in data.items()}))
    return f"""<div class="compare" data-pictures="{sources}"><div class="stage">{pictures}\
<span class="bar"></span></div>
<input type="range" min="0" max="100" value="50" aria-label="position of the divider between the two images">\
<div class="choices">{choice("before", before)}{choice("after", after)}</div></div>"""


def page(results: list[Result], blocks: list[dict]) -> str:
    """Return the whole HTML page, which needs no other files."""
    sections = []
    for dataset, found in by_dataset(results).items():
        scores = found[0].scores
        rows = rows_of(dataset, found, blocks)
        columns, ours = columns_of(rows), first_of(found)
        head = "".join(f"<th>{header(m)}</th>" for m in columns)
        best = {
            m: max((values[m] for _, values, source in rows if not source and m in values), key=METRICS[m].merit)
            for m in columns
        }
        body = []
        for name, values, source in rows:
            cells = []
            for m in columns:
                mark = ' class="best"' if not source and values.get(m) == best[m] else ""
                gap = delta(m, values, ours) if source else ""
                sign = "up" if gap.startswith("+") else "down"
                cells.append(f"<td{mark}>{cell(m, values)}{f'<small class={sign}>{gap}</small>' if gap else ''}</td>")
            mark = f' class="published" title="{html.escape(source)}"' if source else ""
            body.append(f"<tr{mark}><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
        sources = list(dict.fromkeys(source for _, _, source in rows if source))
        charts = "".join(chart(m, found) for m in columns)
        sliders = "".join(
            slider(folder, list(result.scores["methods"]))
            for result in found
            for folder in sorted((result.folder / SHOWN).glob("*"))
        )
        notes = gains(found) + [f"{label} {status}" for label, status in skipped(found).items()]
        notes += [f"{r.name}: commit {r.commit}, {hardware(r)}" for r in found]
        sections.append(
            f"<section><h2>{html.escape(dataset)}</h2><p>{scores['pictures']} images, protocol "
            f"{html.escape(scores['metrics'].get('psnr', {}).get('protocol', scores['protocol']))}.</p>"
            f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>"
            + "".join(
                f"<p class=note>Grey rows: {html.escape(source)}. Small numbers: gain of our first row over this row "
                "(positive: better).</p>"
                for source in sources
            )
            + f"<div class=charts>{charts}</div><div class=sliders>{sliders}</div>"
            + "".join(f"<p class=note>{html.escape(line)}</p>" for line in notes)
            + "</section>"
        )
    return PAGE.replace("@@", "".join(sections))


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width"><title>TEASR evaluation</title>
<style>
:root{color-scheme:light dark;--line:light-dark(#ddd,#444);--soft:light-dark(#666,#aaa)}
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem}
h2{border-bottom:1px solid var(--line);padding-bottom:.2rem;margin-top:2.5rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid var(--line)}
tbody th{text-align:left;font-weight:500}td.best{font-weight:700}tr.published{color:var(--soft)}\
small{display:block;font-size:.75em}
small.up{color:#2a9d6f}small.down{color:#d1603d}.scroll{overflow-x:auto}\
.note{color:var(--soft);font-size:.85em;margin:.3rem 0}
.charts{display:flex;flex-wrap:wrap;gap:1rem;margin:1.2rem 0}figure{margin:0;width:340px;max-width:100%}\
figcaption{font-weight:600}
svg text{font-size:11px;fill:currentColor}svg .grid{stroke:var(--line)}\
svg .base{stroke:var(--soft);stroke-dasharray:5 4}
.legend{margin:.2rem 0;font-size:.85em}.legend span{margin-right:1rem}\
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px}
.sliders{display:flex;flex-wrap:wrap;gap:1.2rem}.compare{width:360px;max-width:100%}\
.stage{position:relative;overflow:hidden;border-radius:6px}
.stage img{display:block;width:100%;image-rendering:pixelated}\
.stage .before{position:absolute;inset:0;clip-path:inset(0 50% 0 0)}
.stage .bar{position:absolute;top:0;bottom:0;left:50%;width:2px;background:#fff;box-shadow:0 0 3px #000}\
.compare input{width:100%;margin:.4rem 0}
.choices{display:flex;justify-content:space-between}
</style></head><body><h1>TEASR evaluation</h1>@@<script>
for(const box of document.querySelectorAll(".compare")){
 const sources=JSON.parse(box.dataset.pictures),before=box.querySelector(".before"),bar=box.querySelector(".bar");
 box.querySelector("input").oninput=e=>{before.style.clipPath=`inset(0 ${100-e.target.value}% 0 0)`;\
bar.style.left=e.target.value+"%"};
 for(const s of box.querySelectorAll("select")){s.onchange=()=>{\
box.querySelector("img."+s.dataset.side).src=sources[s.value]};s.onchange()}
}
</script></body></html>
"""
