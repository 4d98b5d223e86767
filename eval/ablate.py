"""Train and score variants of a config with several seeds: the paper's Table 3, loss ablations, or initialisations.

Running the same command again resumes.

    python eval/ablate.py --config launch/presets/tiny_teasr.yaml --data runs/demo/shards/heldout --seeds 0 1 2 \\
        --out runs/ablation
    python eval/ablate.py --rows losses --config .. --data .. --launcher "deepspeed --num_gpus 8" train.updates=5000

Every combination of row and seed is a separate run below --out (and in MLflow). ablation.md and ablation.json hold the
means and standard deviations over seeds. For every metric and step count, they also state whether each row is better
than the row it is compared with, by how much, and how that compares with the spread over seeds, and how stable each
row's trainings were.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from teasr import run_config as recipe
from teasr.evaluation.metrics import METRICS
from teasr.util.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "table3": {  # each row adds to the previous one
        "fused timesteps": ["backbone.decoupled_timestep=false", "method.time_aware=false"],
        "+ DTC": ["method.time_aware=false"],
        "+ DTC + TAR": [],
    },
    "losses": {  # each row is compared with all losses
        "all losses": [],
        "without L_adv and L_rectify": ["method.lambda_adv=0", "method.lambda_rectify=0"],
        "without L_cons": ["method.lambda_cons=0"],
        "without L_data": ["method.lambda_mse=0", "method.lambda_lpips=0"],
    },
    "starts": {  # for a config that trains all weights of the tiny backbone from a prior
        "all weights, from the prior": [],
        "LoRA on the frozen prior": ["backbone.train=lora"],
        "all weights, from scratch": ["backbone.base=null", "backbone.pair=null"],
    },
}
CHAINS = {"table3"}  # rows are compared with the previous row, not with the first
STEADY = {  # column of metrics.csv -> its label, and how the seeds' values are combined
    "skipped": ("updates skipped", sum),
    "grad_norm": ("gradient norm, largest over median", max),
    "rectify_to_data": ("gradient of L_rectify to L_data", np.mean),
    "checkerboard": ("checkerboard energy", np.mean),
}


def main(arguments: list[str] | None = None) -> int:
    """Train, score and report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the recipe that is varied")
    parser.add_argument("--data", required=True, help="as of eval/benchmark.py")
    parser.add_argument("--rows", choices=tuple(ROWS), default="table3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--metrics", nargs="+", default=["psnr", "ssim"])
    parser.add_argument("--metric-weights", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("data/eval"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--launcher", default="deepspeed --num_gpus 1", help="what starts launch/train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all rows")
    options = parser.parse_args(arguments)
    try:
        for changes in ROWS[options.rows].values():  # report errors before the first training
            recipe.load(options.config, [*options.overrides, *changes])
        found = {name: [one(options, name, seed) for seed in options.seeds] for name in ROWS[options.rows]}
        told = summary(found, options)
        write_atomic(options.out / "ablation.json", json.dumps(told, indent=1).encode())
        text = markdown(told)
        write_atomic(options.out / "ablation.md", text.encode())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    print(f"\n{text}\n{options.out / 'ablation.md'}")
    return 0


def one(options: argparse.Namespace, name: str, seed: int) -> dict:
    """Return the scores of a row with one seed, after training and scoring it unless that is already done.

    Raises ValueError when a command fails.
    """
    run = options.out / f"{name.replace(' ', '_').replace('+', 'plus')}-seed{seed}"
    print(f"\n{name}, seed {seed}: {run}", flush=True)
    settings = [*options.overrides, *ROWS[options.rows][name], f"run_dir={run}", f"seed={seed}"]
    launcher = shlex.split(options.launcher)
    _do([*launcher, str(ROOT / "launch/train.py"), "--config", str(options.config), *settings])
    scoring = ["--data", options.data, "--data-root", str(options.data_root), "--steps", *map(str, options.steps)]
    scoring += ["--metrics", *options.metrics, "--out", str(run / "eval/ablation")]
    if options.metric_weights:
        scoring += ["--metric-weights", str(options.metric_weights)]
    _do([sys.executable, str(ROOT / "eval/benchmark.py"), str(run), *scoring])
    return json.loads((run / "eval/ablation/scores.json").read_text()) | {"training": steadiness(run / "metrics.csv")}


def steadiness(log: Path) -> dict[str, float | None]:
    """Summarise how stable a training was, from its metrics.csv; None marks values that were not logged.

    Returns the number of skipped updates, the largest gradient norm over the median (both after the first tenth of the
    run) and the means of the other columns over the last tenth.
    """
    with open(log) as file:
        rows = list(csv.DictReader(file))
    tenth = math.ceil(len(rows) / 10)
    # updates whose gradient norm is not finite were skipped
    norms = [norm for r in rows[tenth:] if math.isfinite(norm := float(r["grad_norm"]))] or [math.nan]
    told = {"skipped": sum(float(r["skipped"]) for r in rows), "grad_norm": max(norms) / float(np.median(norms))}
    for name in STEADY.keys() - told:
        late = [float(r[name]) for r in rows[-tenth:] if r.get(name)]
        told[name] = float(np.mean(late)) if late else None
    return told


def _do(command: list[str]) -> None:
    done = subprocess.run(command)
    if done.returncode:
        raise ValueError(f"exit code {done.returncode} of {shlex.join(command)}: see above; the same command goes on")


def summary(found: dict[str, list[dict]], options: argparse.Namespace) -> dict:
    """Collect the values of all seeds, their mean and standard deviation, and the comparisons between rows.

    Values are grouped by row, method and metric.
    """
    rows = {}
    for name, seeds in found.items():
        rows[name] = {}
        for method in seeds[0]["methods"]:
            rows[name][method] = {}
            for metric in seeds[0]["methods"][method]:
                values = [scores["methods"][method][metric]["mean"] for scores in seeds]
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                rows[name][method][metric] = {"values": values, "mean": float(np.mean(values)), "deviation": deviation}
    names, first = list(rows), found[next(iter(found))][0]
    pairs = list(itertools.pairwise(names)) if options.rows in CHAINS else [(n, names[0]) for n in names[1:]]
    return {
        "config": str(options.config), "overrides": options.overrides, "seeds": options.seeds,
        "dataset": first["dataset"], "pictures": first["pictures"], "protocol": first["protocol"], "rows": rows,
        "comparisons": [compare(rows, a, b) for a, b in pairs],
        "training": {name: [scores["training"] for scores in seeds] for name, seeds in found.items()},
    }  # fmt: skip


def compare(rows: dict, base: str, better: str) -> dict:
    """Compare the row `better` with the row `base`, seed by seed, for every method and metric.

    A positive gain means that `better` is better; `seeds_for` is the number of seeds with a positive gain.
    """
    gains = {}
    for method, metrics in rows[better].items():
        if method == "bicubic":
            continue
        for metric, told in metrics.items():
            sign = 1 if METRICS[metric].higher else -1
            each = [sign * (a - b) for a, b in zip(told["values"], rows[base][method][metric]["values"], strict=True)]
            deviation = float(np.std(each, ddof=1)) if len(each) > 1 else None
            gains.setdefault(method, {})[metric] = {
                "gain": float(np.mean(each)), "deviation": deviation,
                "seeds_for": sum(g > 0 for g in each), "seeds": len(each),
            }  # fmt: skip
    return {"base": base, "row": better, "gains": gains}


def markdown(told: dict) -> str:
    """Format the tables, and the conclusions in words, as Markdown."""
    metrics = list(next(iter(next(iter(told["rows"].values())).values())))
    digits = {m: 3 if m in ("psnr", "niqe", "musiq", "fid") else 4 for m in metrics}
    lines = [
        f"{told['dataset']}, {told['pictures']} pictures, protocol {told['protocol']}; "
        f"{told['config']} {' '.join(told['overrides'])}; "
        f"seeds {', '.join(map(str, told['seeds']))}; mean ± standard deviation over seeds.", "",
        "| | steps | " + " | ".join(METRICS[m].label for m in metrics) + " |", "|---|---|" + "---|" * len(metrics),
    ]  # fmt: skip
    for i, (name, methods) in enumerate(told["rows"].items()):
        for method, row in methods.items():
            if method == "bicubic" and i:
                continue
            cells = []
            for m in metrics:
                cells.append(f"{row[m]['mean']:.{digits[m]}f}{_spread(row[m]['deviation'], digits[m])}")
            lines.append(f"| {'' if method == 'bicubic' else name} | {method} | {' | '.join(cells)} |")
    for comparison in told["comparisons"]:
        lines += ["", f"**{comparison['row']}** against *{comparison['base']}* (positive: better):", ""]
        for method, row in comparison["gains"].items():
            parts = []
            for m, told_gain in row.items():
                text = (
                    f"{METRICS[m].label} {told_gain['gain']:+.{digits[m]}f}{_spread(told_gain['deviation'], digits[m])}"
                )
                parts.append(f"{text}, {told_gain['seeds_for']} of {told_gain['seeds']} seeds for it")
            lines.append(f"- {method}: {'; '.join(parts)}")
        lines += ["", verdict(comparison)]
    lines += [
        "",
        "How steady the trainings were: all seeds' skipped updates and worst gradient norm after the first tenth; "
        "means of the last tenth.",
        "",
        "| | " + " | ".join(label for label, _ in STEADY.values()) + " |",
        "|---|" + "---|" * len(STEADY),
    ]
    for name, seeds in told["training"].items():
        cells = []
        for key, (_, together) in STEADY.items():
            values = [seed[key] for seed in seeds if seed[key] is not None]
            cells.append(f"{together(values):.3g}" if values else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(deviation: float | None, digits: int) -> str:
    """Format the deviation; empty with one seed, or when the deviation rounds to zero (bicubic)."""
    return f" ± {deviation:.{digits}f}" if deviation and round(deviation, digits) else ""


def verdict(comparison: dict) -> str:
    """State in how many figures all seeds, no seeds or some seeds favour the row."""
    cells = [(g["seeds_for"], g["seeds"]) for row in comparison["gains"].values() for g in row.values()]
    wins, losses = sum(a == n for a, n in cells), sum(a == 0 for a, n in cells)
    return (
        f"In {wins} of {len(cells)} figures every seed finds {comparison['row']} better, "
        f"in {losses} every seed finds it worse, "
        f"in {len(cells) - wins - losses} the seeds disagree."
    )


if __name__ == "__main__":
    sys.exit(main())
