"""Draw methods in the plane of two metrics: the dial of TADSR as a curve, other methods and step counts as points.

    python eval/chart.py --curves runs/dial/ablation.json --points runs/comparison/comparison.json --out docs/dial.svg
    python eval/chart.py --models small=runs/small/eval/val/scores.json --out dial.svg

--curves: results of `eval/ablate.py --strengths ..`, a curve for each row; --points: those of `eval/compare.py`, the
rows with equal updates; --models: scores of `teasr benchmark`, a curve for the steps and one for the strengths. Places
of --curves and --points are means over seeds.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import statistics
import sys
from pathlib import Path

from teasr.evaluation.names import BASELINES, dial_of
from teasr.evaluation.registry import METRICS
from teasr.evaluation.report_chart import HEIGHT, LEFT, WIDTH
from teasr.evaluation.report_plane import Lines, Point, colored, lines_of, plane
from teasr.util import command_line
from teasr.util.files import write_atomic

TITLE, ROW = 20, 17  # height of the title and of a line of the legend, in px
STYLE = (
    "svg{color-scheme:light dark;background:light-dark(#fff,#16181c)}"
    "text{font:12px sans-serif;fill:light-dark(#222,#ddd)}.grid{stroke:light-dark(#ddd,#444)}"
    ".halo{paint-order:stroke;stroke:light-dark(#fff,#16181c);stroke-width:4px}"
)


def main(arguments: list[str] | None = None) -> int:
    """Draw the chart; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, help="ablation.json of eval/ablate.py with --strengths")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows of --curves to draw (default: all)")
    parser.add_argument("--points", type=Path, help="comparison.json of eval/compare.py")
    parser.add_argument(
        "--models", nargs="+", type=_named, default=[], metavar="NAME=FILE", help="scores.json of teasr benchmark"
    )
    parser.add_argument("--x", choices=tuple(METRICS), default="psnr", help="metric to the right (default: psnr)")
    parser.add_argument("--y", choices=tuple(METRICS), default="dists", help="metric upwards (default: dists)")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    options = parser.parse_args(arguments)
    return command_line.run("drawing", lambda: _draw(options), "run the same command again")


def _draw(options: argparse.Namespace) -> None:
    metrics = (options.x, options.y)
    lines = curves(json.loads(options.curves.read_text()), metrics) if options.curves else {}
    if missing := sorted(set(options.rows or ()) - lines.keys()):
        raise ValueError(f"--rows {missing[0]!r} is no row of --curves: choose from {', '.join(lines)}")
    lines = {name: line for name, line in lines.items() if options.rows is None or name in options.rows}
    lines |= points(json.loads(options.points.read_text()), metrics) if options.points else {}
    lines |= lines_of({name: json.loads(path.read_text())["methods"] for name, path in options.models}, *metrics)
    if not lines:
        raise ValueError("nothing to draw: give --curves, --points or --models")
    write_atomic(options.out, chart(lines, metrics).encode())
    print(options.out)


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FILE")
    return name, Path(path)


def curves(result: dict, metrics: tuple[str, str]) -> Lines:
    """Return a line for each row of an ablation with strengths."""
    lines: Lines = {}
    for name, methods in result["rows"].items():
        found = lines_of({name: {method: row for method, row in methods.items() if dial_of(method)}}, *metrics)
        if line := [point for part in found.values() for point in part]:
            lines[name] = line
    return lines


def points(result: dict, metrics: tuple[str, str]) -> Lines:
    """Return a point for each row of a comparison with equal updates, and for the baseline."""
    lines: Lines = {}
    for row in result["rows"]:
        if row.get("equal", "updates") == "updates":
            several = row["method"] not in BASELINES and not re.fullmatch("1 step.*", row["steps"])
            name = f"{row['method']}, {row['steps']}" if several else row["method"]
            lines[name] = [Point(0, name, name, *(statistics.mean(row["scores"][m]) for m in metrics))]
    return lines


def chart(lines: Lines, metrics: tuple[str, str]) -> str:
    """Return the chart with its title and legend as an SVG file, light or dark like the page around it."""
    right, upwards = (f"{METRICS[m].label} ({METRICS[m].better} is better)" for m in metrics)
    title = f"{upwards} against {right}"
    height = TITLE + HEIGHT + ROW * len(lines) + 6
    legend = []
    for i, (name, color) in enumerate(colored(lines)):
        y = TITLE + HEIGHT + ROW * i + 6
        legend.append(f'<rect x="{LEFT}" y="{y}" width="10" height="10" rx="2" fill="{color}"/>')
        legend.append(f'<text x="{LEFT + 16}" y="{y + 9}">{html.escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{2 * WIDTH}" role="img" '
        f'aria-label="{title}"><style>{STYLE}</style><text x="4" y="14">{title}'
        f'</text><g transform="translate(0 {TITLE})">{plane(lines, *metrics)}</g>{"".join(legend)}</svg>\n'
    )


if __name__ == "__main__":
    sys.exit(main())
