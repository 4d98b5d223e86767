"""Train TEASR, OSEDiff, TSD-SR, CSD, D3SR and TADSR side by side, for equal updates and for equal time, and score them.

Running the same command again resumes. The tables are written again after every seed.

    python eval/compare.py --data runs/small/shards/val --updates 2000 --seeds 0 1 2 --out runs/comparison
    python eval/compare.py --data .. --updates 20 --seeds 0 --metrics psnr data.shards=runs/demo/shards/train   # a try

First every method trains a few updates in turn, several rounds, for the median seconds of an update (seconds.json); on
a machine that others use, `--clock cpu` counts the seconds of the processor. `updates` trains all for the same number
of updates; `time` gives each the updates that take as long as TEASR's. All presets have the same prior, data and batch,
the same rate except TADSR's, and the same student except D3SR's and TADSR's, which start from the LQ latent.
comparison.md and comparison.json hold means and standard deviations over seeds. TEASR is scored at 1, 2 and 4 steps, of
which the others have one; TADSR at its default strength.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from teasr import run_config
from teasr.config import presets
from teasr.evaluation.names import BASELINES
from teasr.evaluation.registry import METRICS
from teasr.tracking.environment import git_commit
from teasr.tracking.run_files import check_finished
from teasr.util.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "TEASR"  # whose time the others get


@dataclass(frozen=True)
class Row:
    """A method: its preset, and the numbers of steps it restores in."""

    preset: str
    steps: tuple[int, ...] = (1,)


ROWS = {
    REFERENCE: Row("small_teasr", (1, 2, 4)),
    "OSEDiff": Row("small_osediff"),
    "TSD-SR": Row("small_tsdsr"),
    "CSD (SDS)": Row("small_csd"),
    "D3SR": Row("small_d3sr"),
    "TADSR": Row("small_tadsr"),
}
BUDGETS = ("updates", "time")
CLOCKS = {"wall": "update_s", "cpu": "cpu_s"}  # -> column of timing.csv
QUIET = ("preview.every_updates=0", "tracking.mlflow=false")


def main(arguments: list[str] | None = None) -> int:
    """Measure, train, score and report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="held-out pairs: a shard set, or two folders as LQ:HQ")
    parser.add_argument("--updates", type=int, default=2000, help="updates of every training (default: 2000)")
    parser.add_argument(
        "--budgets",
        nargs="+",
        choices=BUDGETS,
        default=list(BUDGETS),
        help="what is made equal: updates, time or both (default: updates time)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument(
        "--metrics", nargs="+", default=["lpips", "dists", "psnr"], help="metrics (default: lpips dists psnr)"
    )
    parser.add_argument("--metric-weights", type=Path, help="folder of the metrics' weight files")
    parser.add_argument("--timing-updates", type=int, default=20, help="updates of a round of timing (default: 20)")
    parser.add_argument("--timing-rounds", type=int, default=3, help="rounds of timing (default: 3)")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="seconds that are made equal: those that pass, or those of the processor, which other programs on the "
        "machine disturb less; for trainings without a GPU (default: wall)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="folder (default: runs/comparison)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides of all methods")
    options = parser.parse_args(arguments)
    try:
        for row in ROWS.values():  # report errors before the first training
            run_config.load(presets.find(Path(row.preset), presets.RUNS), options.overrides)
        text = compare(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command to resume", file=sys.stderr)
        return 130
    print(f"\n{text}\n{options.out / 'comparison.md'}")
    return 0


def compare(options: argparse.Namespace) -> str:
    """Train and score every method, budget and seed; write the tables after each seed, and return the last one."""
    seconds = update_seconds(options)
    rows: dict[tuple[str, str], dict] = {}
    for budget in options.budgets:
        for seed in options.seeds:
            for name, row in ROWS.items():
                updates = options.updates
                if budget == "time":
                    if name == REFERENCE:
                        continue
                    updates = max(1, round(updates * seconds[REFERENCE] / seconds[name]))
                scores = one(options, name, row, budget, updates, seed)
                add(rows, options.metrics, scores, name, {"equal": budget, "updates": updates, "s": seconds[name]})
            text = write(options, scores, list(rows.values()))
    return text


def add(rows: dict, metrics: list[str], scores: dict, name: str, trained: dict) -> None:
    """Add the scores of one seed to the rows of its method, one for each number of steps, and once to bicubic's."""
    for method, found in scores["methods"].items():
        base = method in BASELINES
        about = {"method": method, "steps": ""} if base else {"method": name, "steps": method} | trained
        key = (method, "") if base else (name, f"{method} {trained['equal']}")
        row = rows.setdefault(key, about | {"scores": {m: [] for m in metrics}})
        for metric in metrics if not base or not row["scores"][metrics[0]] else ():
            row["scores"][metric].append(found[metric]["mean"])


def write(options: argparse.Namespace, scores: dict, rows: list[dict]) -> str:
    """Write comparison.json and comparison.md, bicubic first; return the latter."""
    result = {
        "data": options.data, "overrides": options.overrides, "commit": git_commit(), "clock": options.clock,
        "protocol": scores["protocol"], "pictures": scores["pictures"],
        "rows": sorted(rows, key=lambda row: row["method"] not in BASELINES),
    }  # fmt: skip
    write_atomic(options.out / "comparison.json", json.dumps(result, indent=1).encode())
    text = markdown(result)
    write_atomic(options.out / "comparison.md", text.encode())
    return text


def update_seconds(options: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of an update of each method, measured in turn, or those of an earlier start."""
    file = options.out / "seconds.json"
    if file.is_file():
        return json.loads(file.read_text())
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    for round_ in range(options.timing_rounds):
        for name, row in ROWS.items():
            run = options.out / "timing" / f"{folder_name(name)}-{round_}"
            train(row, run, options.timing_updates, 0, options.overrides)
            with open(run / "timing.csv") as log:
                each = [float(line[CLOCKS[options.clock]]) for line in csv.DictReader(log)]
            found[name] += each[len(each) // 4 :]  # TEASR's ramp is over by then
    seconds = {name: statistics.median(values) for name, values in found.items()}
    write_atomic(file, json.dumps(seconds, indent=1).encode())
    return seconds


def one(options: argparse.Namespace, name: str, row: Row, budget: str, updates: int, seed: int) -> dict:
    """Return the scores of a method with one seed, after training and scoring it unless that is already done."""
    run = options.out / f"{folder_name(name)}-equal_{budget}-seed{seed}"
    print(f"\n{name}, equal {budget}: {updates} updates, seed {seed}: {run}", flush=True)
    train(row, run, updates, seed, options.overrides)
    scoring = ["--data", options.data, "--steps", *map(str, row.steps), "--metrics", *options.metrics]
    scoring += ["--out", str(run / "eval")]
    if options.metric_weights:
        scoring += ["--metric-weights", str(options.metric_weights)]
    call([sys.executable, str(ROOT / "eval/benchmark.py"), str(run), *scoring])
    return json.loads((run / "eval/scores.json").read_text())


def train(row: Row, run: Path, updates: int, seed: int, overrides: list[str]) -> None:
    """Train a method in its run folder, or resume it. Raises ValueError when it stops before its last update."""
    settings = [*QUIET, *overrides, f"run_dir={run}", f"seed={seed}", f"train.updates={updates}"]
    call([sys.executable, str(ROOT / "launch/train.py"), "--config", row.preset, *settings])
    check_finished(run)


def folder_name(name: str) -> str:
    """Return the name of a method as part of a folder's name."""
    return "".join(c.lower() if c.isalnum() else "_" for c in name).strip("_")


def call(command: list[str]) -> None:
    """Run a command. Raises ValueError when it fails."""
    done = subprocess.run(command)
    if done.returncode:
        raise ValueError(f"exit code {done.returncode} of {shlex.join(command)}: see its output above; then run again")


def markdown(result: dict) -> str:
    """Format the table as Markdown."""
    metrics = list(result["rows"][0]["scores"])
    clock = "s an update" if result["clock"] == "wall" else "CPU s an update"
    title = ["method", "steps", "equal", "updates", clock, "seeds", *(METRICS[m].label for m in metrics)]
    lines = [
        f"{result['data']}, {result['pictures']} images, protocol {result['protocol']}; "
        f"commit {result['commit']}; {' '.join(result['overrides'])}",
        "", f"| {' | '.join(title)} |", "|---" * len(title) + "|",
    ]  # fmt: skip
    for row in result["rows"]:
        cells = [row["method"], row["steps"], row.get("equal", ""), str(row.get("updates", ""))]
        cells += [f"{row['s']:.3g}", str(len(row["scores"][metrics[0]]))] if "s" in row else ["", ""]
        for metric in metrics:
            values, digits = row["scores"][metric], 2 if metric == "psnr" else 4
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and len(set(values)) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
