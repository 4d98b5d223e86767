"""Train and score variants of a config with several seeds: the paper's Table 3, and the ablations of each method.

Running the same command again resumes.

    python eval/ablate.py --config launch/presets/tiny_teasr.yaml --data runs/demo/shards/heldout --seeds 0 1 2 \\
        --out runs/ablation
    python eval/ablate.py --rows losses --config .. --data .. --launcher "deepspeed --num_gpus 8" train.updates=5000
    python eval/ablate.py --rows tadsr --config small_tadsr --data .. --steps 1 --strengths 0 0.25 0.5 0.75 1

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

from teasr import run_config
from teasr.commands.benchmark import add_data_options
from teasr.config import presets
from teasr.evaluation.names import BASELINES
from teasr.evaluation.registry import METRICS
from teasr.tracking.run_files import check_finished
from teasr.util import command_line
from teasr.util.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
PIXEL_CNN = ["method.discriminator=prior", "prior.name=pixel_cnn", "method.disc_blocks=4"]
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
    "fake": {  # for a config of TEASR that trains all weights
        "fake score in the student": [],
        "fake score in a copy": ["method.fake=copy"],
    },
    "d3sr": {  # for a config of D3SR that trains all weights
        "MSE": ["method.lambda_adv=0", "method.lambda_ea_dists=0"],
        "MSE and LPIPS": ["method.lambda_adv=0", "method.lambda_ea_dists=0", "method.lambda_lpips=1"],
        "MSE and DISTS": ["method.lambda_adv=0", "method.lambda_ea_dists=0", "method.lambda_dists=1"],
        "MSE and EA-DISTS": ["method.lambda_adv=0"],
        "with discriminator": [],
        "with discriminator without noise": ["method.t_range=[0,0]"],
        "with discriminator of 1 block": ["method.disc_blocks=1"],
        "with discriminator of 4 blocks": ["method.disc_blocks=4"],
        "CNN of pictures": PIXEL_CNN,
        "CNN of pictures without noise": [*PIXEL_CNN, "method.t_range=[0,0]"],
    },
    "tadsr": {
        "full": [],
        "without encoder": ["method.encoder=false"],
        "uncoupled": ["method.coupled=false"],
        "without encoder, uncoupled": ["method.encoder=false", "method.coupled=false"],
        "lambda 0.33": ["method.time_factor=0.33"],
        "lambda 1": ["method.time_factor=1"],
        "without blur": ["method.blur=none"],
        "blur alone": ["method.lambda_vsd=0"],
    },
}
CHAINS = {"table3"}  # rows are compared with the previous row, not with the first
STEADY = {  # column of metrics.csv -> its label, and how the seeds' values are combined
    "skipped": ("updates skipped", sum),
    "grad_norm": ("largest gradient norm / median", max),
    "rectify_to_data": ("gradient RMS, L_rectify / L_data", np.mean),
    "checkerboard": ("checkerboard energy", np.mean),
}


def main(arguments: list[str] | None = None) -> int:
    """Train, score and report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML config whose variants are trained")
    add_data_options(parser, data_required=True)
    parser.add_argument(
        "--rows",
        choices=tuple(ROWS),
        default="table3",
        help="variants to train: table3 (the paper's Table 3), losses (losses left out), starts (LoRA, all weights, "
        "from scratch), fake (TEASR's fake score in a copy), d3sr (its losses and its discriminator) or tadsr (its "
        "parts) (default: table3)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; each row is trained with each (default: 0 1 2)"
    )
    parser.add_argument(
        "--metrics", nargs="+", default=["psnr", "ssim"], help="metrics to compute (default: psnr ssim)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), help="output folder (default: runs/ablation)"
    )
    parser.add_argument(
        "--launcher",
        default="deepspeed --num_gpus 1",
        help="command that starts launch/train.py (default: deepspeed --num_gpus 1)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config overrides of all rows, such as train.updates=100"
    )
    options = parser.parse_args(arguments)
    return command_line.run("training and scoring", lambda: _ablate(options), "run the same command to resume")


def _ablate(options: argparse.Namespace) -> None:
    for changes in ROWS[options.rows].values():  # report errors before the first training
        run_config.load(presets.find(options.config, presets.RUNS), [*options.overrides, *changes])
    found = {name: [one(options, name, seed) for seed in options.seeds] for name in ROWS[options.rows]}
    result = summary(found, options)
    write_atomic(options.out / "ablation.json", json.dumps(result, indent=1).encode())
    text = markdown(result)
    write_atomic(options.out / "ablation.md", text.encode())
    print(f"\n{text}\n{options.out / 'ablation.md'}")


def one(options: argparse.Namespace, name: str, seed: int) -> dict:
    """Return the scores of a row with one seed, after training and scoring it unless that is already done.

    Raises ValueError when a command fails, or the training stops before its last update.
    """
    run = options.out / f"{name.replace(' ', '_').replace('+', 'plus')}-seed{seed}"
    print(f"\n{name}, seed {seed}: {run}", flush=True)
    settings = [*options.overrides, *ROWS[options.rows][name], f"run_dir={run}", f"seed={seed}"]
    launcher = shlex.split(options.launcher)
    _run([*launcher, str(ROOT / "launch/train.py"), "--config", str(options.config), *settings])
    check_finished(run)
    scoring = ["--data", options.data, "--data-root", str(options.data_root), "--steps", *map(str, options.steps)]
    scoring += ["--strengths", *map(str, options.strengths)] if options.strengths else []
    scoring += ["--metrics", *options.metrics, "--out", str(run / "eval/ablation")]
    if options.metric_weights:
        scoring += ["--metric-weights", str(options.metric_weights)]
    _run([sys.executable, str(ROOT / "eval/benchmark.py"), str(run), *scoring])
    return json.loads((run / "eval/ablation/scores.json").read_text()) | {"training": steadiness(run / "metrics.csv")}


def steadiness(log: Path) -> dict[str, float | None]:
    """Summarise how stable a training was, from its metrics.csv; None marks values that were not logged.

    Returns the number of skipped updates, the largest gradient norm over the median (after the first tenth of the run)
    and the means of the other columns over the last tenth.
    """
    with open(log) as file:
        rows = list(csv.DictReader(file))
    tenth = math.ceil(len(rows) / 10)
    # updates whose gradient norm is not finite were skipped
    norms = [norm for r in rows[tenth:] if math.isfinite(norm := float(r["grad_norm"]))] or [math.nan]
    stability = {"skipped": sum(float(r["skipped"]) for r in rows), "grad_norm": max(norms) / float(np.median(norms))}
    for name in STEADY.keys() - stability:
        late = [float(r[name]) for r in rows[-tenth:] if r.get(name)]
        stability[name] = float(np.mean(late)) if late else None
    return stability


def _run(command: list[str]) -> None:
    done = subprocess.run(command)
    if done.returncode:
        raise ValueError(
            f"exit code {done.returncode} of {shlex.join(command)}: see its output above; fix the problem and run "
            "eval/ablate.py again with the same arguments to resume"
        )


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
        if method in BASELINES:
            continue
        for metric, values in metrics.items():
            merit, others = METRICS[metric].merit, rows[base][method][metric]["values"]
            each = [merit(a) - merit(b) for a, b in zip(values["values"], others, strict=True)]
            deviation = float(np.std(each, ddof=1)) if len(each) > 1 else None
            gains.setdefault(method, {})[metric] = {
                "gain": float(np.mean(each)), "deviation": deviation,
                "seeds_for": sum(g > 0 for g in each), "seeds": len(each),
            }  # fmt: skip
    return {"base": base, "row": better, "gains": gains}


def markdown(result: dict) -> str:
    """Format the tables, and the conclusions in words, as Markdown."""
    metrics = list(next(iter(next(iter(result["rows"].values())).values())))
    digits = {m: 3 if m in ("psnr", "niqe", "musiq", "fid") else 4 for m in metrics}
    lines = [
        f"{result['dataset']}, {result['pictures']} images, protocol {result['protocol']}; "
        f"{result['config']} {' '.join(result['overrides'])}; "
        f"seeds {', '.join(map(str, result['seeds']))}; mean ± standard deviation over seeds.", "",
        "| | steps | " + " | ".join(METRICS[m].label for m in metrics) + " |", "|---|---|" + "---|" * len(metrics),
    ]  # fmt: skip
    for i, (name, methods) in enumerate(result["rows"].items()):
        for method, row in methods.items():
            if method in BASELINES and i:
                continue
            cells = []
            for m in metrics:
                cells.append(f"{row[m]['mean']:.{digits[m]}f}{_spread(row[m]['deviation'], digits[m])}")
            lines.append(f"| {'' if method in BASELINES else name} | {method} | {' | '.join(cells)} |")
    for comparison in result["comparisons"]:
        lines += ["", f"**{comparison['row']}** compared with *{comparison['base']}* (positive: better):", ""]
        for method, row in comparison["gains"].items():
            parts = []
            for m, gain in row.items():
                text = f"{METRICS[m].label} {gain['gain']:+.{digits[m]}f}{_spread(gain['deviation'], digits[m])}"
                parts.append(f"{text}, {gain['seeds_for']} of {gain['seeds']} seeds better")
            lines.append(f"- {method}: {'; '.join(parts)}")
        lines += ["", verdict(comparison)]
    lines += [
        "",
        "Stability of the trainings, over all seeds: total number of skipped updates; largest gradient norm relative "
        "to the median, after the first tenth of the run; means over the last tenth of the run.",
        "",
        "| | " + " | ".join(label for label, _ in STEADY.values()) + " |",
        "|---|" + "---|" * len(STEADY),
    ]
    for name, seeds in result["training"].items():
        cells = []
        for key, (_, combine) in STEADY.items():
            values = [seed[key] for seed in seeds if seed[key] is not None]
            cells.append(f"{combine(values):.3g}" if values else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(deviation: float | None, digits: int) -> str:
    """Format the deviation; empty with one seed, or when the deviation rounds to zero (bicubic)."""
    return f" ± {deviation:.{digits}f}" if deviation and round(deviation, digits) else ""


def verdict(comparison: dict) -> str:
    """State in how many comparisons all seeds, no seeds or some seeds favour the row."""
    cells = [(g["seeds_for"], g["seeds"]) for row in comparison["gains"].values() for g in row.values()]
    wins, losses = sum(a == n for a, n in cells), sum(a == 0 for a, n in cells)
    return (
        f"In {wins} of {len(cells)} comparisons {comparison['row']} is better with every seed, "
        f"in {losses} it is worse with every seed, "
        f"and in {len(cells) - wins - losses} the seeds disagree."
    )


if __name__ == "__main__":
    sys.exit(main())
