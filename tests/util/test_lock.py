"""The lock of a folder: one holder at a time, and the lock of a dead holder is taken over by exactly one process."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from teasr.util.lock import STALE_S, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from teasr.util.lock import FolderLock
with FolderLock(Path(sys.argv[1]), "training"):
    print("locked", flush=True)
    sys.stdin.read()
"""
RACE = """
import sys, time
from pathlib import Path
from teasr.util.lock import FolderLock
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
turn = 0
while turn < 60:
    try:
        with FolderLock(folder, "a race"):
            (folder / "inside").mkdir()  # fails if somebody else is inside
            time.sleep(0.001)
            (folder / "inside").rmdir()
            turn += 1
            if turn % 3 == 0:  # leave the lock of a process that has died
                lock = folder / ".lock"
                text = lock.read_text().replace(f'"started": "', '"started": "0')
                (folder / "new").write_text(text)
                (folder / "new").replace(lock)
    except ValueError:
        pass
"""


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def holder(tmp_path):
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_holder_is_refused_and_told_who_has_it(tmp_path, holder):
    with pytest.raises(ValueError) as told, FolderLock(tmp_path, "training"):
        pass
    beginning = f"{tmp_path} is in use by pid {holder.pid} on host {socket.gethostname()} since 20"
    assert str(told.value).startswith(beginning)
    assert str(told.value).endswith(" (training); wait for it or choose another folder")
    with FolderLock(tmp_path, "another part", ".lock-1"):
        pass


def test_the_folder_is_free_after_release_and_nothing_is_left(tmp_path):
    for _ in range(2):
        with FolderLock(tmp_path / "new", "training"):
            assert [p.name for p in (tmp_path / "new").iterdir()] == [".lock"]
    assert not list((tmp_path / "new").iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder):
    """Even while it is a zombie, which nobody has waited for."""
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with FolderLock(tmp_path, "training"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def edit(tmp_path, **changes):
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | changes))


def test_a_process_that_got_the_number_of_a_dead_one_is_not_the_holder(tmp_path, holder):
    edit(tmp_path, started="12")
    with FolderLock(tmp_path, "training"):
        pass


def test_a_lock_of_another_machine_holds_until_it_was_not_refreshed_for_ten_minutes(tmp_path, holder):
    edit(tmp_path, host="elsewhere", pid=99999999)
    lock = tmp_path / ".lock"
    os.utime(lock, (0, time.time() - STALE_S / 2))
    with pytest.raises(ValueError, match=r"on host elsewhere .* 10 minutes after its death"), FolderLock(tmp_path, "x"):
        pass
    os.utime(lock, (0, time.time() - STALE_S - 60))
    with FolderLock(tmp_path, "x"):
        pass


def test_a_holder_refreshes_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("teasr.util.lock.REFRESH_S", 0.01)
    with FolderLock(tmp_path, "training"):
        os.utime(tmp_path / ".lock", (0, 0))
        while (tmp_path / ".lock").stat().st_mtime == 0:
            time.sleep(0.01)


def test_a_lock_that_somebody_else_holds_by_now_is_not_deleted(tmp_path):
    with FolderLock(tmp_path, "training"):
        edit(tmp_path, token="of somebody else")
    assert (tmp_path / ".lock").exists()


def test_a_half_written_lock_holds_for_ten_minutes(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1')
    with pytest.raises(ValueError, match=r"in use by another process \(.lock does not say"), FolderLock(tmp_path, "x"):
        pass
    os.utime(tmp_path / ".lock", (0, 0))
    with FolderLock(tmp_path, "x"):
        pass


def test_a_lock_that_is_a_link_to_nowhere_is_replaced(tmp_path):
    (tmp_path / ".lock").symlink_to("nowhere")
    with FolderLock(tmp_path, "x"):
        assert not (tmp_path / ".lock").is_symlink()


def test_whoever_dies_while_taking_over_is_taken_over_itself(tmp_path, holder):
    holder.kill()
    holder.wait()
    dead = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / f".lock.{dead['token']}").write_text(json.dumps(dead | {"token": "second"}))
    with FolderLock(tmp_path, "training"):
        pass
    assert not list(tmp_path.iterdir())


def test_of_four_processes_never_two_are_inside_though_every_third_dies(tmp_path):
    processes = [start(RACE, tmp_path) for _ in range(4)]
    assert all(p.stdout.readline() == "ready\n" for p in processes)
    for p in processes:
        p.stdin.write("\n")
        p.stdin.flush()
    assert [p.communicate()[1] for p in processes] == [""] * 4
