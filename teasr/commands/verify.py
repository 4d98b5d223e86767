"""`teasr verify`: check the counts, hashes and images of a shard set, and optionally write a contact sheet."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from teasr.util import command_line

MAX_SHOWN = 50  # the most problems that are printed
SUMMARY = "check the counts, hashes and images of a shard set, and optionally write a contact sheet"
EXAMPLES = """examples:
  {prog} data/train
  {prog} data/train --share 0.05 --redo 50 --sheet contact.png

Exit code 0: no problems; 1: the set has problems, and each bad shard and member is named with its fix; 2: nothing to
check.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("shards", type=Path, help="folder of the shard set")
    parser.add_argument(
        "--share", type=float, default=1.0, help="fraction of the samples to decode, at most 1 (default: 1)"
    )
    parser.add_argument(
        "--redo",
        type=int,
        default=0,
        help="number of samples to degrade again from their recorded parameters and compare (default: 0)",
    )
    parser.add_argument("--sheet", type=Path, help="path of a contact sheet (PNG) to write (default: none)")
    parser.add_argument("--workers", type=int, help="number of local processes (default: one per core)")
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr verify") -> int:
    """Check the set and report problems; returns the exit code."""
    options = parser(prog).parse_args(arguments)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process per core; set before numpy is imported
    return command_line.run("checking shards", lambda: _verify(options))


def _verify(options: argparse.Namespace) -> int:
    from teasr.data.prep import engines
    from teasr.data.prep.sheet import contact_sheet
    from teasr.data.prep.verifying import verify_set
    from teasr.imaging import images
    from teasr.util.files import write_atomic

    if not 0 < options.share <= 1:
        raise ValueError(f"--share {options.share}: must be greater than 0 and at most 1")
    if options.sheet and options.sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet {options.sheet}: the contact sheet is a PNG, so its name must end in .png")
    workers = engines.cores() if options.workers is None else options.workers
    problems, warnings, index = verify_set(options.shards, options.share, options.redo, workers)
    for line in [f"warning: {w}" for w in warnings] + problems[:MAX_SHOWN]:
        print(line)
    if len(problems) > MAX_SHOWN:
        print(f".. and {len(problems) - MAX_SHOWN} more problems")
    if options.sheet and not problems:
        write_atomic(options.sheet, images.png_bytes(contact_sheet(options.shards, index)))
    shards = index["shards"]
    if options.redo and index["settings"].get("lq"):
        print("--redo had no effect: the set holds real pairs, whose LQ images were not made by a degradation")
    print(
        f"{options.shards}: {sum(s['nsamples'] for s in shards)} samples in {len(shards)} shards, "
        f"{sum(s['bytes'] for s in shards) / 1e6:.1f} MB, sha256 {index['set_sha256'][:12]}: "
        + (f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "no problems")
    )
    return 1 if problems else 0
