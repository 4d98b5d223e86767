"""Atomic file writes (temporary name, fsync, rename), hashing, and removal of stale temporary files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<pid>\d+)\.tmp")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only if the block succeeds; it is then synced to disk.

    Creates the folder if it does not exist. Raises OSError if the file cannot be written. On any exception the
    temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: after a crash, either the old or the new file exists.

    Raises OSError like `atomic_file`.
    """
    with atomic_file(path) as file:
        file.write(data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits. Raises OSError when it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Hashed:
    """Wraps a writable file; counts and hashes (SHA-256) the bytes written."""

    def __init__(self, file: BinaryIO):
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write `data` to the file and return its result."""
        self.bytes += len(data)
        self.sha256.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        """Number of bytes written."""
        return self.bytes


def read_json(path: Path) -> dict:
    """Read a mapping from a JSON file; empty if the file is missing or invalid."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def remove_strays(folder: Path) -> None:
    """Remove temporary files of dead processes of this machine. Files of other machines may still be in use."""
    for path in folder.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and match["host"] == _host() and not _alive(int(match["pid"])):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames inside it survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:  # a zombie process counts as dead
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
