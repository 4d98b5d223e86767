"""`teasr sync-mlflow`: upload the updates of a run folder that are missing in MLflow."""

from __future__ import annotations

import argparse
from pathlib import Path

from teasr.util import command_line

SUMMARY = "upload the updates of a run folder that are missing in MLflow"
EXAMPLES = """examples:
  {prog} runs/mine                                     to the store that the run's config names
  {prog} runs/mine --uri http://mlflow.example:5000    to another store
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder (run_dir of the training)")
    parser.add_argument("--uri", help="MLflow tracking URI (default: that of the run's config)")
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr sync-mlflow") -> int:
    """Upload; returns the exit code: 0 on success, 2 for an error that the message explains."""
    options = parser(prog).parse_args(arguments)
    return command_line.run("uploading to MLflow", lambda: _sync(options), stopped="run the same command to continue")


def _sync(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from teasr.config import strict_yaml
    from teasr.config.settings import TrackingConfig
    from teasr.tracking.mlflow_run import sync
    from teasr.tracking.run_files import METRICS

    if not (options.run / METRICS).is_file():
        raise ValueError(f"{options.run} is not a run folder: it contains no {METRICS}; give the run_dir of a training")
    path = options.run / "config.yaml"
    settings = strict_yaml.read_yaml(path).get("tracking") or {}
    with strict_yaml.named(path):
        tracking = strict_yaml.build(TrackingConfig, settings, "tracking")
    if options.uri:
        tracking = replace(tracking, uri=options.uri)
    place, sent = sync(options.run, tracking)
    print(f"{sent} updates uploaded to {place}" if sent else f"nothing to upload: {place} is up to date")
    return 0
