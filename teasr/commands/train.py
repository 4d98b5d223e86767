"""`teasr train`: train a model from a YAML config; running the same command again resumes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from teasr.config import presets
from teasr.config.presets import RUNS
from teasr.util import command_line
from teasr.util.optional import needed_for

SUMMARY = "train a model from a YAML config; running the same command again resumes"
EXAMPLES = """examples:
  {prog} --photos ~/pictures --out mymodel                              your own model from a folder of photographs
  {prog} --config tiny_teasr data.shards=data/train run_dir=runs/mine   a preset with two changes; continues if stopped
  {prog} --config mine.yaml --print                                     the whole config with all defaults
  {prog} --config qwen_teasr --dry-run                                  memory and FLOPs, without a GPU

key=value arguments (dotted key, YAML value) override the config. `teasr presets` lists the configs that come
with teasr.

This command starts one process. The launcher of DeepSpeed starts one for each GPU:
  deepspeed --quiet --num_gpus 8 --module teasr.commands.train --config tiny_teasr run_dir=runs/mine
  deepspeed --quiet --num_gpus 8 launch/train.py --config tiny_teasr run_dir=runs/mine      the same in a checkout
"""
# What all ranks found, such as a wrong setting, rank 0 reports. Then the launcher stops the others while they wait.
WAIT_FOR_RANK_0_S = 60


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="YAML config: a file, or the name of a preset").presets = RUNS
    what.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="make shards of these photographs, train a model on them and score it",
    )
    parser.add_argument("--out", type=Path, metavar="MODEL", help="with --photos: the folder of the model and its run")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="with --photos: the model to train further (a folder, or one that comes with teasr), or a preset, which "
        "starts from the beginning (default: small)",
    )
    parser.add_argument(
        "--crops", type=int, metavar="N", help="with --photos: number of training crops of each kind (default: 4000)"
    )
    parser.add_argument("--name", help="with --photos: name of the run in MLflow (default: that of the folder)")
    parser.add_argument("--print", action="store_true", help="print the whole config with all defaults, then exit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print memory, FLOPs and predicted time of one update, then exit; needs no GPU",
    )
    parser.add_argument(
        "--size", type=int, metavar="PX", help="side of the images in --dry-run, in pixels (default: 512)"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="number of ranks in --dry-run (default: 1)")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although the config has changed, provided that the tensors of the checkpoint fit",
    )
    parser.add_argument(
        "--random-init",
        action="store_true",
        help="start from random weights without reading weight files; for benchmarks only",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides, such as train.updates=100")
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr train") -> int:
    """Parse, check and train; returns the exit code: 0 on success, 2 for an error that the message explains."""
    options = _options(arguments, prog)
    try:
        with needed_for("training"):
            return _train(options)
    except (ValueError, FloatingPointError, OSError) as error:
        return report(error)
    except KeyboardInterrupt:
        print("\nstopped; run the same command to continue", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        from teasr.training.endings import out_of_memory

        explained = out_of_memory(error)
        if explained is None:
            raise
        return report(explained)


def _options(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    checked = parser(prog)
    options = checked.parse_intermixed_args(arguments)
    if (options.size or options.ranks) and not options.dry_run:
        checked.error(
            "--size and --ranks require --dry-run; in a training, the shards set the size and the launcher the ranks"
        )
    if options.photos and not options.out:
        checked.error("--photos needs --out, the folder of the model")
    for name in ("out", "start", "name", "crops"):
        if getattr(options, name) is not None and not options.photos:
            checked.error(f"--{'from' if name == 'start' else name} requires --photos")
    for name in ("size", "ranks", "crops"):
        if (given := getattr(options, name)) is not None and given < 1:
            checked.error(f"--{name} {given}: must be >= 1")
    return options


def _train(options: argparse.Namespace) -> int:
    from teasr import run_config
    from teasr.util.output import lenient_output

    if options.photos:
        from teasr.commands import photos

        start, crops = options.start or "small", options.crops or photos.CROPS
        return photos.train(options.photos, options.out, start, options.name, crops, options.overrides)
    settings = run_config.load(presets.find(options.config, RUNS), options.overrides)
    if options.print:
        print(settings.to_yaml(), end="")
        return 0
    if options.dry_run:
        from teasr.training import footprint, timing
        from teasr.training.engine import check_zero, engine_settings

        ranks = options.ranks or 1
        partitioning = engine_settings(settings.train, ranks)
        check_zero(partitioning, settings.train.deepspeed)
        counted = footprint.count(settings, partitioning, options.size or 512, ranks)
        print(footprint.table(counted))
        if getattr(settings.backbone, "dtype", None) == "bf16":  # the cards' rates are those of bf16
            print(timing.table(counted, settings.train.batch // ranks))
        return 0
    if options.random_init:
        settings = settings.with_random_weights()
    from teasr.commands import sync_mlflow
    from teasr.training.trainer import Trainer

    with lenient_output():
        trainer = Trainer(settings, options.accept_changes)
        began = trainer.update
        trainer.fit()
        if trainer.world.main and began < settings.train.updates <= trainer.update:
            sync_mlflow.after_training(trainer.run_dir, settings.tracking)
        if trainer.world.main and trainer.update >= settings.train.updates:
            print(_next_commands(settings, trainer.networks.student.restores), flush=True)
    return 0


def _next_commands(settings, restores: bool) -> str:
    """Say where a finished model is, and how to use it."""
    run = settings.run_dir
    if not restores:
        return f"the prior is in {run}; a training starts from it with backbone.base={run}"
    size = f"photo_x{settings.scale}.png" if settings.scale > 1 else "restored.png"
    data = settings.preview.shards or "HELDOUT"
    return (
        f"the model is in {run}; next:\n  teasr upscale photo.jpg -o {size} --model {run}\n"
        f"  teasr benchmark {run} --data {data}"
    )


def report(error: Exception) -> int:
    """Print an error in one line; returns the exit code. Other ranks first wait whether rank 0 prints the same."""
    from torch import distributed

    from teasr.util.output import lenient_output

    rank = os.environ.get("RANK", "0")
    if rank != "0" and not distributed.is_initialized():
        time.sleep(WAIT_FOR_RANK_0_S)
    with lenient_output():
        who, text = "" if rank == "0" else f" (rank {rank})", " ".join(str(error).split("\n"))
        print(f"error{who}: {text}", file=sys.stderr, flush=True)
    return 2


def program(arguments: list[str] | None = None, prog: str = "python -m teasr.commands.train") -> NoReturn:
    """Train, then leave the process with the exit code, past the shutdown of torch.distributed (see `leave`)."""
    code = main(arguments, prog)
    from teasr.util.distributed import leave

    leave(code)


if __name__ == "__main__":
    program()
