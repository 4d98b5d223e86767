"""Kill a training run repeatedly at random moments and compare its final files with those of an uninterrupted run.

    python bench/chaos.py runs/demo/shards/train [--kills 20] [train.deepspeed=ds_configs/zero1.json ..]
    python bench/chaos.py runs/demo/shards/train --ranks 2 train.micro_batch=4
    python bench/chaos.py runs/demo/shards/train --ranks 2 --one-rank train.micro_batch=4

Every kill is a SIGKILL of all processes (launcher and ranks), or of one rank alone, at a random moment of a start, of
some updates, or of a save; the same command then resumes. A kill is survived when the newest complete checkpoint is no
older than the last one that the run had finished (and the others have ended after the death of one rank), and lost
otherwise. Exit code 1 when a kill was lost, or when weights, optimiser moments, moving average or metrics.csv differ in
a single byte.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from teasr.util import checkpoint_folder
from teasr.util.distributed import free_port

ROOT = Path(__file__).resolve().parent.parent
END_S = 120  # seconds within which the others must end after the death of one rank
MOMENTS = ("before the first update", "between saves", "inside a save")
SETTINGS = ["train.updates=120", "train.save_every_updates=5", "tracking.mlflow=false"]


class Job:
    """A training that runs in its own processes."""

    def __init__(self, run: Path, options: argparse.Namespace):
        program = [sys.executable]
        if options.ranks > 1:
            program = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(options.ranks)]
            program += ["--master_port", str(free_port())]
        shards = [f"data.shards={options.shards}", f"preview.shards={options.shards}", f"run_dir={run}"]
        program += ["launch/train.py", "--config", options.config, *SETTINGS, *shards, *options.settings]
        env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.begun = time.time()
        self.log = open(f"{run}.log", "a")  # noqa: SIM115 - open as long as the process runs
        self.process = subprocess.Popen(program, cwd=ROOT, env=env, stdout=self.log, stderr=self.log)

    def kill(self) -> bool:
        """Kill all processes of the job at once; returns True, since all have ended."""
        family = self._family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=10)
        return True

    def kill_one_rank(self, draw: random.Random) -> bool:
        """Kill a random rank alone; returns whether the launcher and the other ranks then ended by themselves."""
        family = self._family()
        ranks = [member for member in family if "RANK" in _environment(member)]
        if not ranks:
            return self.kill()
        draw.choice(ranks).kill()
        alive = psutil.wait_procs(family, timeout=END_S)[1]
        self.kill()
        return not alive

    def _family(self) -> list[psutil.Process]:
        try:
            return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            return []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def newest_update(run: Path) -> int:
    """Return the newest update in metrics.csv, or -1 before the first row."""
    lines = (run / "metrics.csv").read_text().splitlines()[1:] if (run / "metrics.csv").is_file() else []
    return int(lines[-1].split(",")[0]) if lines else -1


def written(run: Path) -> int:
    """Return when metrics.csv was last written, or 0 without one; a start rewrites it."""
    return (run / "metrics.csv").stat().st_mtime_ns if (run / "metrics.csv").is_file() else 0


def saved_update(run: Path) -> int:
    """Return the update of the newest checkpoint folder, complete or not, or 0 without one."""
    return max((int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*")), default=0)


def saving(run: Path, since: float) -> bool:
    """Whether a save begun after `since` (seconds) is still running; leftovers of killed saves do not count."""
    return any(p.stat().st_mtime > since for p in (run / "checkpoints").glob(".tmp-*") if p.exists())


def final_files(run: Path) -> dict[str, bytes]:
    """Return the files that a run ends with, by name."""
    files = [*checkpoint_folder.latest(run / "checkpoints").glob("*.safetensors"), run / "metrics.csv"]
    return {path.name: path.read_bytes() for path in files + sorted((run / "previews").glob("*.png"))}


def wait(job: Job, run: Path, moment: str, saved: int, draw: random.Random) -> None:
    """Wait for a moment of the wanted kind, or for the end of the job.

    `saved`: update of the newest checkpoint when the job was started.
    """
    until = time.monotonic() + draw.uniform(0, 12)
    updates, before = saved + draw.randint(1, 6), written(run)

    def moment_reached() -> bool:
        if moment == MOMENTS[0]:
            return time.monotonic() >= until
        if written(run) == before or newest_update(run) < updates:
            return False
        return moment == MOMENTS[1] or saving(run, job.begun)

    while job.process.poll() is None and not moment_reached():
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.3 if moment == MOMENTS[1] else 0.02))


def main() -> int:
    """Run uninterrupted, then with kills; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=lambda text: Path(text).resolve(), help="folder of a training shard set")
    parser.add_argument(
        "--config",
        default="launch/presets/tiny_teasr.yaml",
        help="YAML config of the run (default: launch/presets/tiny_teasr.yaml)",
    )
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument(
        "--one-rank", action="store_true", help="kill one random rank instead of all processes; needs --ranks 2 or more"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="config overrides, such as train.micro_batch=4"
    )
    options = parser.parse_intermixed_args()
    place, draw = Path(tempfile.mkdtemp()), random.Random(options.seed)
    started = time.monotonic()
    if Job(place / "whole", options).process.wait():
        print((place / "whole.log").read_text()[-2000:])
        return 1
    print(f"uninterrupted run: {time.monotonic() - started:.1f} s", flush=True)
    run, survived, where = place / "killed", 0, dict.fromkeys(MOMENTS, 0)
    for i in range(options.kills):
        before, saved_before = written(run), saved_update(run)
        job = Job(run, options)
        wait(job, run, draw.choice(MOMENTS), saved_before, draw)
        if job.process.poll() is not None:
            print(f"the run finished before kill {i + 1}: add more updates, such as train.updates=300")
            break
        ended = job.kill_one_rank(draw) if options.one_rank else job.kill()
        reached, saved = newest_update(run), saved_update(run)
        inside = saving(run, job.begun)
        kind = MOMENTS[2 if inside else written(run) != before]
        where[kind] += 1
        found = checkpoint_folder.latest(run / "checkpoints")
        good = ended and (saved == 0 or (found is not None and found.name == checkpoint_folder.name_of(saved)))
        survived += good
        state = "intact" if good else "LOST" if ended else "the other processes did not end"
        print(f"kill {i + 1}, {kind}: last update {reached}, newest checkpoint {saved}, {state}", flush=True)
    end = Job(run, options)
    failed = end.process.wait()
    equal = not failed and final_files(run) == final_files(place / "whole")
    print(f"kills: {', '.join(f'{n} {kind}' for kind, n in where.items())}; {options.ranks} rank(s)")
    print(
        f"survived {survived}, lost {sum(where.values()) - survived}; "
        f"final files {'are identical to' if equal else 'DIFFER FROM'} those of the uninterrupted run"
    )
    if equal:
        shutil.rmtree(place)
    return 0 if equal and survived == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
