"""Prepare training shards from photographs; running the same command again resumes.

    python data_prep/make_shards.py photos=~/pictures out=data/train degradation=osediff crop_px=512
    python data_prep/make_shards.py photos=real/HR lq=real/LR out=data/real          # real pairs, nothing is degraded
    python data_prep/make_shards.py --config data_prep/presets/demo_train.yaml --workers 1
    RANK=3 WORLD_SIZE=16 python data_prep/make_shards.py ..                          # one of 16 array jobs
    python data_prep/make_shards.py --engine ray ..                                  # on the cluster of RAY_ADDRESS

Options come from --config and from key=value arguments; data_prep/README.md explains them. Exit code 2: an error that
the message explains.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process per core; set before numpy is imported

from teasr.config import strict_yaml as cfg
from teasr.data.prep import engines
from teasr.data.prep.job import make_set
from teasr.data.prep.plan import PrepConfig


def main(arguments: list[str] | None = None) -> int:
    """Scan the photographs, write all missing shards, then the index; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with settings (default: none)")
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where to run: local processes or Ray tasks (default: local)",
    )
    parser.add_argument(
        "--workers", type=int, default=engines.cores(), help="number of local processes (default: one per core)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a set of other settings or photographs in out=, or write into a folder of other files",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, such as crop_px=512; they override those of --config",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        config = cfg.load(PrepConfig, options.config, options.overrides)
        make_set(config, options.engine, options.workers, *engines.split_from_environment(), options.overwrite)
    except OSError as error:
        print(
            f"error: {error}; finished shards are kept; fix the problem and run the same command again",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; finished shards are kept; run the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
