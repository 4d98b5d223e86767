"""Score a checkpoint on held-out pairs at several step counts, beside bicubic; results go to files and MLflow.

    python eval/benchmark.py runs/demo --data runs/demo/shards/heldout --steps 1 2 4 8

Writes scores.json (means), scores_by_picture.csv and comparison.png (LQ | steps.. | HQ) into the run folder or --out.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from teasr import checkpoint, images
from teasr.data.shards import Sample, ShardSet, decode, read_shard
from teasr.files import write_atomic
from teasr.metrics import METRICS
from teasr.progress import ProgressLine
from teasr.seed import seed_of
from teasr.tracking import git_commit, log_results

COMPARED = 6  # pictures in comparison.png, at most


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, or say that it was done before; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--data", required=True, help="shard set of held-out pairs")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--weights", choices=("ema", "weights"), default="ema", help="averaged or last weights")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the run folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    options = parser.parse_args(arguments)
    try:
        evaluate(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Restore every held-out picture at every step count, score, write and log."""
    from teasr.upscale import Upscaler

    folder = checkpoint.resolve(options.model)
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    out = options.out or run_dir
    shards = ShardSet.open(options.data)
    what = {
        "checkpoint": folder.name, "manifest": json.loads((folder / checkpoint.MANIFEST).read_text()), "data": shards.settings,
        "samples": len(shards), "steps": options.steps, "weights": options.weights, "seed": options.seed,
    }  # fmt: skip
    done = _read_json(out / "evaluation.json")
    if done.get("what") == what and (out / "scores.json").is_file():
        print(f"already evaluated: {folder} on {options.data}")
        print_table(json.loads((out / "scores.json").read_text()), out)
        return
    upscaler = Upscaler.from_pretrained(folder, options.weights)
    rows, pictures = restore_all(upscaler, shards, options.steps, options.seed)
    scores = {
        name: {metric: float(np.mean([row[metric] for row in rows if row["method"] == name])) for metric in METRICS}
        for name in ["bicubic", *map(str, options.steps)]
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, ["picture", "method", *METRICS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "scores_by_picture.csv", text.getvalue().encode())
    write_atomic(out / "scores.json", json.dumps(scores, indent=1).encode())
    titles = ["LQ (bicubic)", *(f"{n} step{'s' * (n > 1)}" for n in options.steps), "HQ"]
    write_atomic(out / "comparison.png", images.png_bytes(images.comparison(pictures, titles)))
    print_table(scores, out)
    recipe = upscaler.recipe
    if recipe.tracking.mlflow:
        metrics = {f"eval/{m}": {n: scores[str(n)][m] for n in options.steps} for m in METRICS}
        metrics |= {f"eval/bicubic_{m}": {0: scores["bicubic"][m]} for m in METRICS}
        metrics |= {f"eval/{m}_{n}_steps": {0: scores[str(n)][m]} for m in METRICS for n in options.steps}
        files = [out / "scores.json", out / "scores_by_picture.csv", out / "comparison.png"]
        try:
            print("logged to", log_results(run_dir, recipe.tracking, recipe.to_dict(), metrics, files))
        except ValueError as error:
            print(f"warning: {error}; the files are complete, run this again when it is back", flush=True)
            return
    write_atomic(out / "evaluation.json", json.dumps({"what": what, "commit": git_commit()}, indent=1).encode())


def restore_all(upscaler, shards: ShardSet, steps: list[int], seed: int) -> tuple[list[dict], list[list[np.ndarray]]]:
    """Scores of every picture and method, and the rows of the comparison sheet."""
    rows, pictures = [], []
    line = ProgressLine("evaluate", len(shards), "pictures")
    compared = {round(i * (len(shards) - 1) / (COMPARED - 1)) for i in range(COMPARED)}  # spread over the set
    for i, sample in enumerate(samples(shards)):
        if sample.scale != upscaler.scale:
            raise ValueError(
                f"{sample.key} is a x{sample.scale} pair, the model restores x{upscaler.scale}: make x{upscaler.scale} shards"
            )
        made = {"bicubic": sample.lq_up}
        made |= {str(n): upscaler(sample.lq, steps=n, seed=seed_of(seed, sample.key)) for n in steps}
        scores = {name: {m: f(x, sample.hq) for m, f in METRICS.items()} for name, x in made.items()}
        rows += [{"picture": sample.key, "method": name} | values for name, values in scores.items()]
        if i in compared:
            pictures.append([*made.values(), sample.hq])
        line.show(i + 1, psnr_y=scores[str(steps[0])]["psnr_y"])
    line.close()
    return rows, pictures


def samples(shards: ShardSet) -> Iterator[Sample]:
    """Every pair in file order; a broken one is an error, a score of less is not what was asked for."""
    for url in shards.urls:
        for raw in read_shard(url):
            yield decode(raw)


def print_table(scores: dict, out: Path) -> None:
    """The table, and where everything lies."""
    print(f"\n{'':>10s}  {'PSNR-Y dB':>9s}  {'SSIM-Y':>7s}")
    for name, values in scores.items():
        label = name if name == "bicubic" else f"{name} step{'s' * (name != '1')}"
        print(f"{label:>10s}  {values['psnr_y']:9.3f}  {values['ssim_y']:7.4f}")
    print(f"\nscores {out / 'scores.json'}\npictures {out / 'comparison.png'}")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    sys.exit(main())
