"""Check the counts, hashes and images of a shard set, and optionally write a contact sheet.

    python data_prep/verify_shards.py data/train
    python data_prep/verify_shards.py data/train --share 0.05 --redo 50 --sheet contact.png

Exit code 0: no problems; 1: the set has problems, and each bad shard and member is named with its fix; 2: nothing to
check.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process per core; set before numpy is imported

from teasr.data.prep import engines
from teasr.data.prep.verifying import contact_sheet, verify_set
from teasr.imaging import images
from teasr.util.files import write_atomic

NAMED = 50


def main(arguments: list[str] | None = None) -> int:
    """Check the set and report problems; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder of the shard set")
    parser.add_argument("--share", type=float, default=1.0, help="share of the samples to decode (default: all)")
    parser.add_argument(
        "--redo", type=int, default=0, help="so many samples are degraded again from their record and compared"
    )
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (PNG) here")
    parser.add_argument("--workers", type=int, default=engines.cores(), help="local processes (default: every core)")
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.share <= 1:
            raise ValueError(f"--share {options.share}: a share inside (0, 1]")
        problems, warnings, index = verify_set(options.shards, options.share, options.redo, options.workers)
        for line in [f"warning: {w}" for w in warnings] + problems[:NAMED]:
            print(line)
        if len(problems) > NAMED:
            print(f".. and {len(problems) - NAMED} more")
        if options.sheet and not problems:
            write_atomic(options.sheet, images.png_bytes(contact_sheet(options.shards, index)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shards = index["shards"]
    if options.redo and index["settings"].get("lq"):
        print("real pairs: there is no degradation to redo")
    print(
        f"{options.shards}: {sum(s['nsamples'] for s in shards)} samples in {len(shards)} shards, "
        f"{sum(s['bytes'] for s in shards) / 1e6:.1f} MB, sha256 {index['set_sha256'][:12]}: "
        + (f"{len(problems)} problems" if problems else "all good")
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
