"""`teasr prepare`: make training shards from photographs; running the same command again resumes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from teasr.config import presets
from teasr.config.presets import DATA
from teasr.util import command_line

SUMMARY = "prepare training shards from photographs; running the same command again resumes"
EXAMPLES = """examples:
  {prog} photos=~/pictures out=data/train degradation=osediff crop_px=512
  {prog} photos=real/HR lq=real/LR out=data/real         real pairs, nothing is degraded
  {prog} --config denoise photos=~/pictures --workers 1  a preset
  RANK=3 WORLD_SIZE=16 {prog} ..                         one of 16 array jobs
  {prog} --engine ray ..                                 on the cluster of RAY_ADDRESS

Settings come from --config and from key=value arguments; data_prep/README.md of the repository explains them, and
`teasr presets` lists the configs that come with teasr. Exit code 2: an error that the message explains.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument(
        "--config", type=Path, help="YAML file with settings, or the name of a preset (default: none)"
    ).presets = DATA
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where to run: local processes or Ray tasks (default: local)",
    )
    parser.add_argument("--workers", type=int, help="number of local processes (default: one per core)")
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
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr prepare") -> int:
    """Scan the photographs, write all missing shards, then the index; returns the exit code."""
    options = parser(prog).parse_intermixed_args(arguments)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process per core; set before numpy is imported
    return command_line.run_by_shard("preparing shards", lambda: _prepare(options))


def _prepare(options: argparse.Namespace) -> None:
    from teasr.config import strict_yaml
    from teasr.data.prep import engines
    from teasr.data.prep.job import make_set
    from teasr.data.prep.plan import PrepConfig

    path = None if options.config is None else presets.find(options.config, DATA)
    config = strict_yaml.load(PrepConfig, path, options.overrides)
    workers = engines.cores() if options.workers is None else options.workers
    make_set(config, options.engine, workers, *engines.split_from_environment(), options.overwrite)
