"""`teasr benchmark`: score a model, or existing predictions, on held-out pairs, and compare with bicubic."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from teasr.config import presets
from teasr.util import command_line

SUMMARY = "score a model at several step counts, or existing predictions, on held-out pairs, and compare with bicubic"
EXAMPLES = """examples:
  {prog} runs/demo --data runs/demo/shards/heldout --steps 1 2 4 8
  {prog} runs/mine --data RealSR --data-root ~/testsets --metric-weights ~/metric_weights
  {prog} runs/mine --data lq_folder:hq_folder --protocol crop4
  {prog} small --data runs/demo/shards/heldout --steps 1 2 4 --strengths 0 0.25 0.5 0.75 1     a curve in the report
  {prog} --predictions their_pictures --hq hq_folder --name theirs --out results/theirs
  torchrun --nproc_per_node 8 --module teasr.commands.benchmark runs/mine --data DIV2K-Val     on 8 GPUs

Writes scores.json (means, 95 % intervals), scores_by_picture.csv, speed.json, comparison.png, extremes.png (best and
worst) and the images to RUN/eval/DATASET or --out, and logs them to MLflow. Running the same command again resumes. A
metric whose weights are missing is reported together with the fix; --require makes it an error. The test sets that
--data knows by name are those of `teasr presets show datasets`.
"""


def add_data_options(parser: argparse.ArgumentParser, data_required: bool = False) -> None:
    """Add the options that say what is scored, which `eval/ablate.py` has too."""
    parser.add_argument(
        "--data",
        required=data_required,
        help="held-out pairs: a shard set, two folders as LQ:HQ, or a name of `teasr presets show datasets`",
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path("data/eval"),
        help="folder that contains the test sets of `teasr presets show datasets` (default: data/eval)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="numbers of sampling steps to score (default: 1 2 4 8)",
    )
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        metavar="S",
        default=[],
        help="values of the dial strength, 0 to 1, to score with one step besides --steps, for a model that has this "
        "dial (default: none)",
    )
    parser.add_argument(
        "--metric-weights",
        type=Path,
        help="folder of the metrics' weight files (default: TEASR_METRIC_WEIGHTS or ~/.cache/teasr/metric_weights)",
    )


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    from teasr.evaluation.registry import METRICS, PROTOCOLS

    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help="folder of a run, a checkpoint or an export; or `small`, the model shipped with teasr",
    )
    add_data_options(parser)
    parser.add_argument(
        "--weights",
        choices=("ema", "weights"),
        default="ema",
        help="ema: moving average of the weights; weights: those of the last update (default: ema)",
    )
    parser.add_argument(
        "--fidelity",
        type=float,
        default=0.0,
        help="0 to 1: how far to blend the results of several steps with the one-step result (default: 0, no blending)",
    )
    parser.add_argument(
        "--color",
        default="none",
        help="method of matching colours of the results to those of LQ: none, wavelet, adain or lab (default: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling noise (default: 0)")
    parser.add_argument(
        "--predictions", type=Path, help="folder of images to score instead of those of a model; needs --hq and --out"
    )
    parser.add_argument("--hq", type=Path, help="folder of the originals of --predictions, with the same file names")
    parser.add_argument(
        "--name", default="predictions", help="name of --predictions in the results (default: predictions)"
    )
    parser.add_argument("--metrics", nargs="+", help=f"metrics to compute (default: {' '.join(METRICS)})")
    parser.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="osediff",
        help="how to compute PSNR and SSIM: osediff (Y channel), crop4 (Y, 4 px of border cropped) or rgb "
        "(default: osediff)",
    )
    parser.add_argument(
        "--require", action="store_true", help="fail if a metric is not available, instead of skipping it"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: RUN/eval/DATASET)")
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr benchmark") -> int:
    """Evaluate, or report that it was already done; returns the exit code."""
    options = parser(prog).parse_args(arguments)
    return command_line.run("the benchmark", lambda: _benchmark(options), "run the same command to resume")


def _benchmark(options: argparse.Namespace) -> None:
    from teasr.evaluation import scoring

    scoring.evaluate(options, presets.names(presets.SETS)["datasets"])


if __name__ == "__main__":
    sys.exit(main(prog="python -m teasr.commands.benchmark"))
