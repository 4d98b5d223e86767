"""The report as one web page: tables, charts, pictures under a divider, and how all of it was made."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path

from teasr.evaluation.names import CAPTION, SHOWN, shown_name
from teasr.evaluation.registry import MEANINGS, METRICS
from teasr.evaluation.report import (
    Result,
    by_dataset,
    cell,
    columns_of,
    delta,
    first_of,
    gains,
    header,
    rows_of,
    skipped,
)
from teasr.evaluation.report_chart import chart
from teasr.evaluation.report_style import SCRIPT, STYLE
from teasr.evaluation.report_trade import PERCEPTION, trade


def page(results: list[Result], blocks: list[dict], made: Mapping[str, str]) -> str:
    """Return the whole HTML page, which needs no other files. made: date, command and commit of the report itself."""
    sections = "".join(_section(dataset, found, blocks) for dataset, found in by_dataset(results).items())
    about = " · ".join(f"{html.escape(key)} {_code(key, value)}" for key, value in made.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>TEASR evaluation</title><style>{STYLE}</style></head><body><h1>TEASR evaluation</h1>"
        f"<p class=note>{about}</p>{sections}<dialog></dialog><script>{SCRIPT}</script></body></html>\n"
    )


def _section(dataset: str, found: list[Result], blocks: list[dict]) -> str:
    scores, rows = found[0].scores, rows_of(dataset, found, blocks)
    columns = columns_of(rows)
    protocol = scores["metrics"].get("psnr", {}).get("protocol", scores["protocol"])
    charts = "".join(trade(m, found) for m in PERCEPTION if m in columns) + "".join(chart(m, found) for m in columns)
    pictures = "".join(
        comparison(folder, result) for result in found for folder in sorted((result.folder / SHOWN).glob("*"))
    )
    hint = "<p class=note>Drag on a picture to move the divider; click to enlarge it.</p>" if pictures else ""
    band = "<p class=note>Bands are 95 % intervals over pictures; hover a point for its value.</p>" if charts else ""
    return (
        f"<section><h2>{html.escape(dataset)}</h2><p>{scores['pictures']} images; PSNR and SSIM on "
        f"{html.escape(protocol)}.</p>{_table(rows, columns, first_of(found))}{_notes(found)}{_meanings(columns)}"
        f"{band}<div class=charts>{charts}</div>{hint}<div class=pictures>{pictures}</div>{_origins(found)}</section>"
    )


def _table(rows: list, columns: list[str], ours: dict[str, float]) -> str:
    head = "".join(f'<th title="{html.escape(_meaning(m))}"><abbr>{header(m)}</abbr></th>' for m in columns)
    own = [values for _, values, source in rows if not source]
    best = {m: max((values[m] for values in own if m in values), key=METRICS[m].merit) for m in columns}
    body = []
    for name, values, source in rows:
        cells = []
        for m in columns:
            mark = ' class="best" title="the best of our rows"' if not source and values.get(m) == best[m] else ""
            gap = delta(m, values, ours) if source else ""
            sign = "up" if gap.startswith("+") else "down"
            cells.append(f"<td{mark}>{cell(m, values)}{f'<small class={sign}>{gap}</small>' if gap else ''}</td>")
        mark = f' class="published" title="{html.escape(source)}"' if source else ""
        body.append(f"<tr{mark}><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    sources = dict.fromkeys(source for _, _, source in rows if source)
    notes = "".join(
        f"<p class=note>Grey rows: {html.escape(source)}. Small numbers: gain of our first row over this row "
        "(positive: better).</p>"
        for source in sources
    )
    return (
        f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"<p class=note>Bold: the best of our rows. Hover a metric for its meaning.</p>{notes}"
    )


def _notes(found: list[Result]) -> str:
    missing: dict[str, list[str]] = {}
    for label, status in skipped(found).items():
        missing.setdefault(status, []).append(label)
    lines = gains(found) + [f"{', '.join(labels)} {status}" for status, labels in missing.items()]
    return "".join(f"<p class=note>{html.escape(line)}</p>" for line in lines)


def _meaning(metric: str) -> str:
    return f"{MEANINGS[metric]} {METRICS[metric].better.capitalize()} is better."


def _meanings(columns: list[str]) -> str:
    """The meanings again, for screens without a pointer."""
    terms = "".join(f"<dt>{header(m)}</dt><dd>{html.escape(_meaning(m))}</dd>" for m in columns)
    return f"<details><summary>What the metrics mean</summary><dl>{terms}</dl></details>"


def _origins(found: list[Result]) -> str:
    """How each result was made, with the link to its MLflow run."""
    parts = []
    for result in found:
        rows = {key: _code(key, value) for key, value in result.origin.items()}
        if result.mlflow:
            link, command = (html.escape(result.mlflow[key]) for key in ("link", "command"))
            served = f" (after <code>{command}</code>)" if command else ""
            rows["MLflow"] = f'<a href="{link}">losses, previews, model and files of this run</a>{served}'
        terms = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items())
        parts.append(f"<h3>How {html.escape(result.name)} was scored</h3><dl>{terms}</dl>")
    return "".join(parts)


def _code(key: str, value: str) -> str:
    return f"<code>{html.escape(value)}</code>" if key in ("command", "commit") else html.escape(value)


def comparison(folder: Path, result: Result) -> str:
    """Return a picture of `shown/` with a divider between two of its versions, which can be selected."""
    titles = [t for t in [*result.scores["methods"], "HQ"] if (folder / shown_name(t)).is_file()]
    if len(titles) < 2:
        return ""
    data = {t: base64.b64encode((folder / shown_name(t)).read_bytes()).decode() for t in titles}
    name, scores = _caption(folder)

    def choice(side: str, chosen: str) -> str:
        options = "".join(f"<option{' selected' if t == chosen else ''}>{html.escape(t)}</option>" for t in titles)
        where = "left" if side == "before" else "right"
        return f'<label>{where} <select data-side="{side}">{options}</select></label>'

    sources = html.escape(json.dumps({t: f"data:image/png;base64,{d}" for t, d in data.items()}))
    return f"""<figure class="compare" data-pictures="{sources}" data-scores="{html.escape(json.dumps(scores))}">\
<div class="stage"><img class="after" alt="" draggable="false"><img class="before" alt="" draggable="false">\
<span class="bar"></span><span class="tag before"></span><span class="tag after"></span>\
<input type="range" min="0" max="100" value="50" aria-label="position of the divider">\
<button class="enlarge" title="enlarge" aria-label="enlarge">⤢</button></div>\
<div class="choices">{choice("before", titles[0])}{choice("after", titles[1])}</div>\
<figcaption><b>{html.escape(f"{result.name}, {name}")}</b> <span></span></figcaption></figure>"""


def _caption(folder: Path) -> tuple[str, dict[str, str]]:
    """Name of a picture in `shown/`, and for each method a text with its scores; older results have only numbers."""
    try:
        found = json.loads((folder / CAPTION).read_text())
        text = {
            method: ", ".join(f"{METRICS[m].label} {cell(m, row)}" for m in row if m in METRICS)
            for method, row in found["scores"].items()
        }
        return f"picture {found['picture']}", text
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"picture {int(folder.name) + 1}" if folder.name.isdigit() else folder.name, {}
