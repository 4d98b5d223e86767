"""A run keeps its last good checkpoint and its log whatever happens: divergence, damage, a second training, a kill."""

import errno
import os
import shutil
import signal
import threading
import time

import psutil
import pytest
import torch
from conftest import small_recipe
from test_resume import begin, last, same, updates, wait_for
from test_training import rows, start
from torch._utils import ExceptionWrapper

from teasr.training.endings import explained, out_of_memory
from teasr.util.lock import FolderLock, locked

COMMON = {"train__save_every_updates": 2, "train__keep_checkpoints": 1}


def error(run) -> str:
    return (run / "error.txt").read_text()


def damage(checkpoint) -> None:
    path = checkpoint / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """Six updates without a break."""
    folder = tmp_path_factory.mktemp("whole")
    start([small_recipe(shards, folder / "run", **COMMON, train__updates=6)], folder, 1)
    return folder / "run"


def test_a_run_that_diverges_goes_back_to_the_last_good_checkpoint(shards, tmp_path, whole):
    """keep_checkpoints=1 and a save after every update: the first save with a bad rate must not evict the good one.

    Afterwards the good rate continues to the bits of a run that never diverged, and the bad log is kept.
    """
    run = tmp_path / "run"
    good = small_recipe(shards, run, **COMMON, train__updates=4)
    wild = {"train__learning_rate": 1e10, "train__max_skipped": 2, "train__updates": 30, "train__save_every_updates": 1}
    bad = small_recipe(shards, run, **(COMMON | wild)) | {"accept_changes": True}
    start([good, bad], tmp_path, 1)
    assert "3 updates in a row were not finite (listed in skipped_updates.txt), up to update 8" in error(run)
    assert f"the last good checkpoint is {last(run)}, from which the run resumes" in error(run)
    assert "no finite update followed step-00000005, which is now named diverged-step-00000005" in error(run)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000004", "diverged-step-00000005", "proven"}
    start([small_recipe(shards, run, **COMMON, train__updates=6)], tmp_path, 1)
    same(whole, run)
    assert [row["skipped"] for row in rows(run / "earlier-1")] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_a_run_whose_last_update_is_not_finite_does_not_end_well(shards, tmp_path):
    """An update that was skipped is never saved; the save that was due waits for the next finite update."""
    run, common = tmp_path / "run", COMMON | {"train__keep_checkpoints": 9}
    jobs = [
        small_recipe(shards, tmp_path / "waits", **common, train__updates=7) | {"harm": {"poison": [3, 4]}},
        small_recipe(shards, run, **common, train__updates=4) | {"harm": {"poison": [3]}},
        small_recipe(shards, tmp_path / "none", **common, train__updates=2) | {"harm": {"poison": [0, 1]}},
    ]
    start(jobs, tmp_path, 1)
    names = [p.name for p in sorted((tmp_path / "waits/checkpoints").glob("step-*"))]
    assert names == ["step-00000002", "step-00000006", "step-00000007"]
    assert "1 updates in a row were not finite" in error(run) and f"good checkpoint is {last(run)}" in error(run)
    assert last(run).name == "step-00000002" and (run / "status").read_text() == "FAILED\n"
    assert "there is no checkpoint yet" in error(tmp_path / "none")


def test_a_damaged_checkpoint_is_kept_under_another_name_and_does_not_count(shards, tmp_path, whole):
    """With keep_checkpoints=1 it would otherwise be the newest for ever, and every new checkpoint would be removed."""
    run = tmp_path / "run"
    start([small_recipe(shards, run, **COMMON, train__updates=4)], tmp_path, 1)
    damage(last(run))
    start([small_recipe(shards, run, **COMMON, train__updates=6)], tmp_path, 1)
    same(whole, run)
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert names == {"damaged-step-00000004", "step-00000004", "step-00000006", "proven"}

    for folder in (run / "checkpoints").glob("step-*"):
        damage(folder)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "error.txt"}
    start([small_recipe(shards, run, **COMMON, train__updates=8)], tmp_path, 1)
    assert f"every checkpoint in {run / 'checkpoints'} is damaged (step-00000006: weights" in error(run)
    assert "choose another run_dir" in error(run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path in before}

    shutil.rmtree(run / "checkpoints")
    start([small_recipe(shards, run, **COMMON, train__updates=2)], tmp_path, 1)
    assert updates(run) == 2 and updates(run / "earlier-1") == 6


def test_a_second_training_in_a_run_folder_is_refused(shards, tmp_path):
    run = tmp_path / "run"
    with FolderLock(run, "training"):
        start([small_recipe(shards, run, train__updates=1)], tmp_path, 1)
        assert f"{run} is in use by pid {os.getpid()} on host" in error(run) and "(training)" in error(run)
        assert not (run / "metrics.csv").exists()
    start([small_recipe(shards, run, train__updates=1)] * 2, tmp_path, 1)
    assert updates(run) == 1 and not (run / ".lock").exists()


def elsewhere(run, age_s: float = 0) -> None:
    """Make the lock of a process on another machine, refreshed `age_s` seconds ago."""
    lock = FolderLock(run, "training")
    with lock:
        text = lock.path.read_text().replace(lock.me.host, "elsewhere")
    lock.path.write_text(text)
    os.utime(lock.path, (time.time() - age_s,) * 2)


def test_the_lock_of_a_machine_that_died_is_waited_for(tmp_path, capsys):
    """A job that a cluster starts again on another machine must not fail because the first machine died."""
    elsewhere(tmp_path, age_s=598)
    with locked(FolderLock(tmp_path, "training"), print, every_s=0.1):
        assert "in use" in capsys.readouterr().out
    elsewhere(tmp_path)

    def say(text: str) -> None:  # the other machine refreshes its lock after the first look at it
        print(text)
        threading.Timer(0.3, os.utime, [tmp_path / ".lock"]).start()

    with pytest.raises(ValueError, match="on host elsewhere"), locked(FolderLock(tmp_path, "t"), say, every_s=0.1):
        pass
    assert capsys.readouterr().out.count("waiting to see whether it has died") == 1


def test_a_killed_loader_process_is_one_clear_line(shards, tmp_path):
    data = small_recipe(shards, tmp_path / "run", train__updates=100_000, train__save_every_updates=3, data__workers=1)
    process = begin(data, tmp_path, 1)
    wait_for(process, lambda: updates(tmp_path / "run") >= 4)
    loader = psutil.Process(process.pid).children()[0]
    loader.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 2 and "Traceback" not in out
    told = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "a process that reads the training data has died" in told[0]
    assert f"run the same command to resume from update {int(last(tmp_path / 'run').name[5:])}" in told[0]


def test_errors_of_libraries_are_told_in_one_line():
    try:
        raise ValueError("no shard of x can be used")
    except ValueError:
        passed_on = ExceptionWrapper(where="in DataLoader worker process 0")  # as torch hands it to the main process
    with pytest.raises(ValueError) as caught:
        passed_on.reraise()
    assert "Traceback" in str(caught.value)
    assert str(explained(caught.value, 1, 0)) == "no shard of x can be used"
    assert "a process that reads the training data has died" in str(explained(ConnectionResetError(104, "reset"), 1, 0))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert "the memory is not sufficient (" in str(explained(caught.value, 1, 4))
    assert "from update 4" in str(explained(caught.value, 1, 4))
    assert out_of_memory(RuntimeError("a bug")) is None and explained(OSError(errno.EIO, "x"), 2, 0) is None


def test_a_batch_that_cannot_fit_is_refused(shards, tmp_path):
    run = tmp_path / "run"
    start([small_recipe(shards, run, train__batch=10**8)], tmp_path, 1)
    assert "the 100,000,000 pairs of 64x64 px that each rank reads for one update take 12,288 GB" in error(run)
