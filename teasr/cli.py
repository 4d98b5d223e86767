"""The command `teasr`: what is done with finished runs, a sub-command each.

teasr sync-mlflow runs/demo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; returns the exit code: 0 done, 2 a mistake that the message explains."""
    parser = argparse.ArgumentParser(prog="teasr", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync-mlflow", help="send to MLflow what it lacks of a run folder")
    sync.add_argument("run", type=Path, help="run folder")
    sync.add_argument("--uri", help="another store than that of the run's config")
    sync.set_defaults(act=_sync)
    options = parser.parse_args(arguments)
    try:
        options.act(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _sync(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from teasr import config
    from teasr.settings import TrackingConfig
    from teasr.tracking import METRICS, sync

    if not (options.run / METRICS).is_file():
        raise ValueError(f"{options.run} is no run folder: it holds no {METRICS}")
    tracking = config.build(
        TrackingConfig, config.read_yaml(options.run / "config.yaml").get("tracking") or {}, "tracking"
    )
    if options.uri:
        tracking = replace(tracking, uri=options.uri)
    place, sent = sync(options.run, tracking)
    print(f"{sent} updates sent to {place}" if sent else f"nothing was missing at {place}")


if __name__ == "__main__":
    sys.exit(main())
