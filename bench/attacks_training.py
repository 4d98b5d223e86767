"""The attacks on training, for bench/attacks.py."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
from attacks import PATIENCE_S, ROOT, finished, make_shards, photos, refused, run

WRONG = {  # override -> words of the error
    "train.updates=[": ("train.updates=[", "not valid YAML"),
    "train.learning_rate=.nan": ("tiny_teasr.yaml", "train.learning_rate = nan", "finite"),
    "method.w_cap=.inf": ("method.w_cap = inf", "finite"),
    "seed=-1": ("seed = -1", "must be in [0, "),
    "train.update=5": ("tiny_teasr.yaml", "train.update does not exist", "updates"),
    "train={updates: 1, updates: 2}": ("updates is given twice",),
    "train.batch=100000000": ("train.batch", "GB"),
    "train.deepspeed=/dev/null": ("/dev/null", "cannot be read"),
}


def shards(folder: Path) -> Path:
    """A small shard set."""
    finished(make_shards(photos(folder / "photos"), folder / "set"))
    return folder / "set"


def arguments(folder: Path, *more: str) -> tuple[str, ...]:
    """The arguments of launch/train.py for a run in `folder`/run; `more` are added and win."""
    small = ("backbone.width=32", "backbone.depth=2", "backbone.heads=2", "train.batch=2", "train.micro_batch=2")
    small += ("data.streams=1", "preview.every_updates=0", "train.save_every_updates=2", "train.keep_checkpoints=1")
    places = (f"run_dir={folder}/run", f"data.shards={folder}/set", "tracking.mlflow=false", "train.updates=4")
    deepspeed = f"train.deepspeed={ROOT}/ds_configs/zero1.json"
    return ("--config", str(ROOT / "launch/presets/tiny_teasr.yaml"), *small, *places, deepspeed, *more)


def train(folder: Path, *more: str) -> subprocess.CompletedProcess:
    """Train to the end."""
    return run("launch/train.py", *arguments(folder, *more))


def begin(folder: Path, *more: str, **streams: object) -> subprocess.Popen:
    """Start an endless training and wait until it has logged three updates."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/train.py"), *arguments(folder, "train.updates=1000000", *more)],
        cwd=ROOT, text=True, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams),
    )  # fmt: skip
    log, until = folder / "run/metrics.csv", time.monotonic() + PATIENCE_S
    while not log.is_file() or log.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < until, "the training did not start"
        time.sleep(0.1)
    return process


def end(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for the end of a training."""
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def names(folder: Path) -> list[str]:
    """What lies in the folder of checkpoints."""
    return sorted(path.name for path in (folder / "run/checkpoints").iterdir())


def damage(folder: Path) -> None:
    """Change the last byte of the weights of every checkpoint that has its usual name."""
    for path in (folder / "run/checkpoints").glob("step-*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")


def wrong_settings(folder: Path) -> str:
    """Values that no training can use."""
    shards(folder)
    for override, words in WRONG.items():
        refused(train(folder, override), *words)
    assert not (folder / "run").exists(), "a run folder was made"
    return f"{len(WRONG)} settings refused"


def a_rate_that_diverges(folder: Path) -> str:
    """A learning rate of 1e10 in a run that keeps one checkpoint and saves after every update."""
    shards(folder)
    finished(train(folder))
    wild = ("train.learning_rate=1e10", "train.save_every_updates=1", "train.updates=40", "--accept-changes")
    told = refused(train(folder, *wild), "last good checkpoint is", "step-00000004")
    assert names(folder) == ["diverged-step-00000005", "proven", "step-00000004"], names(folder)
    finished(train(folder, "train.updates=6"))
    return told


def damaged_checkpoints(folder: Path) -> str:
    """A damaged newest checkpoint in a run that keeps one; then all are damaged."""
    shards(folder)
    finished(train(folder))
    path = folder / "run/checkpoints/step-00000004/weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    finished(train(folder, "train.updates=6"))
    assert names(folder) == ["damaged-step-00000004", "proven", "step-00000004", "step-00000006"], names(folder)
    damage(folder)
    before = (folder / "run/metrics.csv").read_bytes()
    told = refused(train(folder, "train.updates=8"), "every checkpoint in", "is damaged", "run_dir")
    assert (folder / "run/metrics.csv").read_bytes() == before, "metrics.csv was overwritten"
    return told


def two_trainings_at_once(folder: Path) -> str:
    """Two trainings in one run folder."""
    shards(folder)
    first = begin(folder)
    try:
        return refused(train(folder), f"is in use by pid {first.pid}", "(training)")
    finally:
        first.kill()
        first.communicate()


def killed_loader(folder: Path) -> str:
    """The process that reads the data is killed."""
    shards(folder)
    process = begin(folder, "data.workers=1")
    psutil.Process(process.pid).children()[0].kill()
    return refused(end(process), "has died", "run the same command")


def log_on_a_full_disk(folder: Path) -> str:
    """Standard output and standard error cannot be written."""
    shards(folder)
    with open("/dev/full", "w") as full:
        process = begin(folder, stdout=full, stderr=full)
        process.terminate()
        end(process)
    assert process.returncode == 0 and (folder / "run/status").read_text() == "KILLED\n", "the run ended badly"
    return "the run went on, saved and ended with exit code 0"


TRAINING = [
    ("settings that no training can use", wrong_settings),
    ("learning rate of 1e10 in a good run", a_rate_that_diverges),
    ("damaged checkpoints", damaged_checkpoints),
    ("two trainings in one run folder", two_trainings_at_once),
    ("loader process killed", killed_loader),
    ("log file on a full disk", log_on_a_full_disk),
]
