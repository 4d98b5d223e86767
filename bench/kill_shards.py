"""Kill `make_shards.py` repeatedly at random moments and compare the set's hash with that of an uninterrupted run.

    python bench/kill_shards.py ~/pictures [--rounds 20] [crop_px=128 crops_per_photo=4 ..]

Each round starts from an empty folder. It kills the whole job (workers too, SIGKILL) up to three times, at random
moments within the time that an uninterrupted run takes, then lets the same command finish. Exit code 1 when any hash
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    """Run the rounds; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=20, help="number of shard sets to make (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        default=["crop_px=128", "crops_per_photo=4", "shard_samples=64"],
        help="settings of make_shards.py (default: crop_px=128 crops_per_photo=4 shard_samples=64)",
    )
    options = parser.parse_intermixed_args()
    place, draw = Path(tempfile.mkdtemp()), random.Random(options.seed)

    def command(out: Path) -> list[str]:
        script = Path(__file__).parent.parent / "data_prep/make_shards.py"
        return [sys.executable, str(script), f"photos={options.photos}", f"out={out}", *options.settings]

    def set_hash(out: Path) -> str:
        return json.loads((out / "index.json").read_text())["set_sha256"]

    started = time.monotonic()
    subprocess.run(command(place / "whole"), check=True, stdout=subprocess.DEVNULL)
    whole, wanted = time.monotonic() - started, set_hash(place / "whole")
    print(f"uninterrupted run: {whole:.1f} s, sha256 {wanted[:12]}")
    equal, kills = 0, 0
    for i in range(options.rounds):
        out = place / f"round-{i}"
        moments = [draw.uniform(0.05, 1.0) * whole for _ in range(draw.randint(1, 3))]
        for moment in moments:
            job = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, start_new_session=True)
            try:
                job.wait(moment)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
                kills += 1
        subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL)
        strays = [p.name for p in out.iterdir() if p.suffix == ".tmp"]
        good = set_hash(out) == wanted and not strays
        equal += good
        print(
            f"round {i + 1}: killed after {', '.join(f'{m:.1f}' for m in moments)} s: "
            f"{'identical' if good else 'DIFFERENT, or temporary files left'}"
        )
        shutil.rmtree(out)
    shutil.rmtree(place)
    print(f"{equal} of {options.rounds} rounds identical to the uninterrupted run, {kills} kills")
    return 0 if equal == options.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
