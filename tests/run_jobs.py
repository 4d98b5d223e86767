"""Run training jobs one after another, in this process or on these ranks: `run_jobs.py jobs.json`.

Each job is a config. An exception raised by the Trainer is written to <run_dir>/error.txt and does not stop the other
jobs. Under "harm" a job may request faults:
- {"poison": [updates]} sets pixels of rank 0's images to NaN in these updates;
- {"no_files_after": update} prevents every file from growing past 10 kB from this update on;
- {"full_disk": [first, last]} prevents rank 0 from writing files during these updates;
- {"damage": update} breaks four shards in four ways.

Start it directly for one rank and through the deepspeed launcher for several. Running many cases in one process saves
the start-up time of each.
"""

import argparse
import json
import math
import resource
import traceback
from pathlib import Path

import prototypes  # noqa: F401 - registers its method, as the next one does
import two_roles  # noqa: F401

from teasr.run_config import parse
from teasr.training import trainer as training
from teasr.util.distributed import leave

WHOLE = training.batches


def break_shards(folder: Path) -> None:
    """Break four shards: truncate one, flip a bit in one, empty one and delete one."""
    cut, flipped, empty, missing = sorted(folder.glob("shard-*.tar"))[:4]
    cut.write_bytes(cut.read_bytes()[:3000])
    data = bytearray(flipped.read_bytes())
    data[data.index(b"IDAT") + 60] ^= 1
    flipped.write_bytes(data)
    empty.write_bytes(b"")
    missing.unlink()


def harm(
    trainer: training.Trainer,
    poison: tuple = (),
    no_files_after: int | None = None,
    damage: int | None = None,
    full_disk: tuple = (),
) -> None:
    """Inject the requested faults into this run."""

    def batches(*arguments):
        nonlocal damage
        for batch, names in WHOLE(*arguments):
            if trainer.update in poison and trainer.world.main:
                batch.x_hq[0, :, :8, :8] = math.nan
            if trainer.update == no_files_after:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            if full_disk and trainer.world.main:
                first, last = full_disk
                limit = 1 if first <= trainer.update + 1 <= last else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if trainer.update == damage and trainer.world.main:
                break_shards(Path(trainer.shards.location))
                damage = None
            yield batch, names

    training.batches = batches


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)
    for job in json.loads(parser.parse_args().jobs.read_text()):
        done_to, accept = job.pop("harm", {}), job.pop("accept_changes", False)
        try:
            trainer = training.Trainer(parse(job), accept)
            harm(trainer, **done_to)
            trainer.fit()
        except (ValueError, FloatingPointError, OSError):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            Path(job["run_dir"]).mkdir(parents=True, exist_ok=True)
            (Path(job["run_dir"]) / "error.txt").write_text(traceback.format_exc())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    leave(0)
