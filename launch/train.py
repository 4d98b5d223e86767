"""Train a model from a YAML config; running the same command again resumes.

    deepspeed launch/train.py --config launch/presets/tiny_teasr.yaml
    deepspeed --num_gpus 2 launch/train.py --config launch/presets/tiny_teasr.yaml train.batch=16 run_dir=runs/two
    python launch/train.py --config launch/presets/tiny_teasr.yaml --print
    python launch/train.py --config launch/presets/qwen_teasr.yaml --dry-run

key=value arguments (dotted key, YAML value) override the file. Without the DeepSpeed launcher, training runs as one
process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from torch import distributed

from teasr import run_config
from teasr.training.endings import out_of_memory
from teasr.util.distributed import leave
from teasr.util.output import lenient_output

# What all ranks found, such as a wrong setting, rank 0 reports. Then the launcher stops the others while they wait.
WAIT_FOR_RANK_0_S = 60


def main(arguments: list[str] | None = None) -> int:
    """Parse, check and train; returns the exit code: 0 on success, 2 for an error that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML config, such as launch/presets/tiny_teasr.yaml"
    )
    parser.add_argument("--print", action="store_true", help="print the whole config with all defaults, then exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="print memory and FLOPs of one update, then exit; needs no GPU"
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
    options = parser.parse_intermixed_args(arguments)
    if (options.size or options.ranks) and not options.dry_run:
        parser.error(
            "--size and --ranks require --dry-run; in a training, the shards set the size and the launcher the ranks"
        )
    for name in ("size", "ranks"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"--{name} {given}: must be >= 1")
    try:
        settings = run_config.load(options.config, options.overrides)
        if options.print:
            print(settings.to_yaml(), end="")
            return 0
        if options.dry_run:
            from teasr.training import footprint
            from teasr.training.engine import check_zero, engine_settings

            ranks = options.ranks or 1
            partitioning = engine_settings(settings.train, ranks)
            check_zero(partitioning, settings.train.deepspeed)
            print(footprint.table(footprint.count(settings, partitioning, options.size or 512, ranks)))
            return 0
        if options.random_init:
            settings = settings.with_random_weights()
        from teasr.training.trainer import Trainer

        with lenient_output():
            Trainer(settings, options.accept_changes).fit()
    except (ValueError, FloatingPointError, OSError) as error:
        return report(error)
    except KeyboardInterrupt:
        print("\nstopped; run the same command to continue", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        explained = out_of_memory(error)
        if explained is None:
            raise
        return report(explained)
    return 0


def report(error: Exception) -> int:
    """Print an error in one line; returns the exit code. Other ranks first wait whether rank 0 prints the same."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not distributed.is_initialized():
        time.sleep(WAIT_FOR_RANK_0_S)
    with lenient_output():
        who, text = "" if rank == "0" else f" (rank {rank})", " ".join(str(error).split("\n"))
        print(f"error{who}: {text}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    leave(main())
