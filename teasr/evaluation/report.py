"""A report on several evaluations: what is in it, and its tables as Markdown; `report_page` makes the web page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teasr.config import strict_yaml
from teasr.evaluation.names import BASELINES, BICUBIC
from teasr.evaluation.registry import METRICS
from teasr.util.files import read_json

SHORT = ("psnr", "fid", "musiq", "niqe")  # metrics that papers give with two digits


@dataclass
class Result:
    """One evaluation, as stored in its result folder."""

    name: str
    folder: Path
    scores: dict
    speed: dict
    mlflow: dict = field(default_factory=dict)  # `link` to the page of its run and the `command` that serves it

    @classmethod
    def read(cls, folder: Path, name: str | None = None, mlflow: dict | None = None) -> Result:
        """Read a result folder. Raises ValueError when `folder` is not one."""
        try:
            scores = json.loads((folder / "scores.json").read_text())
            scores["methods"], scores["metrics"], scores["dataset"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{folder} contains no scores.json of `teasr benchmark`: give result folders such as RUN/eval/DATASET"
            ) from None
        mlflow = mlflow or read_json(folder / "evaluation.json").get("mlflow", {})
        run = folder.parent.parent.name if folder.parent.name == "eval" else folder.name
        return cls(name or run, folder, scores, read_json(folder / "speed.json"), mlflow)

    @property
    def origin(self) -> dict[str, str]:
        """How these numbers were made: date, command, commit, hardware and seconds per picture, as far as known."""
        seconds = {name: times["seconds_median"] for name, times in self.speed.get("methods", {}).items()}
        found = {
            "date": self.speed.get("date", "").replace("T", " ").replace("+00:00", " UTC"),
            "command": self.speed.get("command", ""),
            "commit": self.speed.get("commit", "unknown"),
            "hardware": self.speed.get("device", "unknown"),
            "time per picture": ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items()),
        }
        return {key: value for key, value in found.items() if value}


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
    digits = 2 if metric in SHORT else 4
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
        for result in found:
            made = result.origin | ({"MLflow": result.mlflow["link"]} if result.mlflow else {})
            lines += ["", f"{result.name}:", "", *(f"- {key}: {value}" for key, value in made.items())]
        lines += [""]
    return "\n".join(lines)
