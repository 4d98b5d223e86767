"""A lock for a folder that several processes, also on several machines, may want to write to: one holder at a time.

The lock is a small file that says who holds it. Only the exclusive creation of files and renaming are needed, so it
works on network file systems too. The lock of a dead process is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from teasr.util.files import alive

REFRESH_S, STALE_S = 60.0, 600.0  # a holder on another machine counts as dead if it has not refreshed for STALE_S


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `started`: when the process began (clock ticks since boot). `token`: unique to every lock."""

    pid: int
    host: str
    started: str
    since: str
    purpose: str
    token: str


class InUse(ValueError):
    """The folder is locked by another process. `elsewhere`: on another machine, where it may have died."""

    def __init__(self, text: str, elsewhere: bool):
        super().__init__(text)
        self.elsewhere = elsewhere


UNKNOWN = Holder(0, "", "", "", "", "unknown")  # of a lock file that is incomplete, or that somebody has edited


class FolderLock:
    """Context manager that holds `folder` for one process at a time, for example for "training".

    Creates the folder if needed. `name` is the lock file's name: locks of different names do not exclude each other.
    Raises InUse (a ValueError) that names the holder if another process has the lock, OSError if it cannot be written.
    """

    def __init__(self, folder: Path, purpose: str, name: str = ".lock"):
        self.folder, self.path = Path(folder), Path(folder) / name
        now = datetime.now().isoformat(" ", "seconds")
        self.me = Holder(os.getpid(), socket.gethostname(), _started(os.getpid()), now, purpose, secrets.token_hex(8))
        self._released = threading.Event()

    def __enter__(self) -> FolderLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take(self.path)
        threading.Thread(target=self._refresh, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._released.set()
        if _read(self.path) == self.me:
            self.path.unlink(missing_ok=True)

    def _take(self, path: Path) -> None:
        """Create the file at `path` for this process, or take it over from a dead one.

        Whoever takes over the lock of a dead holder first creates a claim, a file named after the holder's token. Only
        one process at a time has this claim, and nobody else may replace the dead holder's file. A claim is a lock
        itself: if its creator dies, it is taken over in the same way.
        """
        while not self._create(path):
            if (holder := _read(path)) is None:
                continue  # released since
            if not _stale(path, holder):
                raise InUse(self._refusal(holder), holder.host != self.me.host)
            claim = path.with_name(f"{path.name}.{holder.token}")
            self._take(claim)
            if _read(path) == holder and _stale(path, holder):
                os.replace(claim, path)
                return
            claim.unlink(missing_ok=True)  # somebody else was faster

    def _create(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(handle, "w") as file:
                file.write(json.dumps(asdict(self.me)))
        except OSError:  # the disk is full
            path.unlink(missing_ok=True)
            raise
        return True

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH_S):
            if _read(self.path) == self.me:
                with contextlib.suppress(OSError):
                    os.utime(self.path)

    def _refusal(self, holder: Holder) -> str:
        who = f"by pid {holder.pid} on host {holder.host} since {holder.since} ({holder.purpose})"
        if holder == UNKNOWN:
            who = f"by another process ({self.path.name} does not say which)"
        text = f"{self.folder} is in use {who}; wait for it or choose another folder"
        if holder.host != self.me.host:
            text += f" (if that process has died, the folder is free {STALE_S / 60:.0f} minutes after its death)"
        return text


@contextlib.contextmanager
def locked(lock: FolderLock, say: Callable[[str], None], every_s: float = 5.0) -> Iterator[None]:
    """Context manager that holds the lock, and waits for it if its holder is on another machine and may have died.

    Waits until that lock is out of date. Raises InUse that names the holder when that process is alive. `say(text)` is
    called once if there is something to wait for; `every_s`: seconds between two looks.
    """
    refreshed = None
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock)
                break
            except InUse as error:
                now = lock.path.stat().st_mtime_ns if lock.path.exists() else None
                if not error.elsewhere or (refreshed and now and refreshed != now):
                    raise
                if refreshed is None:
                    say(f"{error}; waiting to see whether it has died")
                refreshed = now
            time.sleep(every_s)
        yield


def holders(folder: Path, pattern: str) -> list[Holder]:
    """Who holds the locks of a folder whose file names match the pattern; locks of dead processes are left out."""
    found = [(path, _read(path)) for path in sorted(Path(folder).glob(pattern))]
    return [holder for path, holder in found if holder and not _stale(path, holder)]


def _read(path: Path) -> Holder | None:
    """Who holds the lock file; None if it does not exist. Waits a moment while it is being written."""
    for _ in range(20):
        try:
            return Holder(**json.loads(path.read_text()))
        except FileNotFoundError:
            return UNKNOWN if path.is_symlink() else None
        except (ValueError, TypeError):
            time.sleep(0.05)
    return UNKNOWN


def _stale(path: Path, holder: Holder) -> bool:
    """Whether the holder is dead: its process on this machine, or a lock that was not refreshed for long."""
    if holder.host == socket.gethostname():
        return not alive(holder.pid) or _started(holder.pid) not in (holder.started, "")
    try:
        return time.time() - path.stat().st_mtime > STALE_S
    except FileNotFoundError:  # released since: trying again creates it
        return True


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot: tells two processes with one id apart. "" if not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
