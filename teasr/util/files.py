"""Atomic file writes (temporary name, fsync, rename), removal of stale temporary files, hashing, careful reading."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\..+\.(?P<host>[^.-]*)-(?P<pid>\d+)(-[0-9a-f]+)?\.tmp", re.DOTALL)
PROBE_BYTES = 2**16
LONGEST = 100  # bytes of a file's name in the name of its temporary file; file systems allow 255 in all


@contextlib.contextmanager
def atomic_file(path: Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only if the block succeeds; it is then synced to disk.

    Creates the folder if it does not exist. Raises OSError if the file cannot be written; without `overwrite`,
    FileExistsError if `path` exists by then. On any exception the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary_name(path.name))
    try:
        with open(temporary, "xb") as file:  # x: never through a link that somebody has put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path) if overwrite else _rename_to_new(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
        temporary.unlink()
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "it exists already", str(path)) from None
    except OSError:  # a file system without hard links, where a file that appears just now is lost
        if path.exists():
            raise FileExistsError(errno.EEXIST, "it exists already", str(path)) from None
        os.replace(temporary, path)


def check_writable(path: Path) -> None:
    """Raise OSError, naming the path, if a file cannot be written there: no permission, no space, no such disk.

    Leaves nothing behind; a folder that does not exist yet is not created.
    """
    folder = path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    temporary = folder / _temporary_name(path.name)
    try:
        with open(temporary, "xb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _temporary_name(name: str) -> str:
    if len(os.fsencode(name)) > LONGEST:
        name = f"{name[: LONGEST // 8]}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


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


def unusual(path: Path | str) -> str:
    """Why a path cannot be read like a file, such as "special file: a named pipe"; empty for a file or a link to one.

    Reading from a named pipe or a device could wait forever.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        return f"file cannot be read: {getattr(error, 'strerror', None) or error}"
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return "" if stat.S_ISREG(mode) else f"special file: {kinds.get(stat.S_IFMT(mode), 'a device')}"


def read_json(path: Path) -> dict:
    """Read a mapping from a JSON file; empty if the file is missing or invalid."""
    try:
        data = {} if unusual(path) else json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def remove_strays(folder: Path) -> None:
    """Remove temporary files of dead processes of this machine. Files of other machines may still be in use."""
    for path in folder.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and match["host"] == _host() and not alive(int(match["pid"])):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames inside it survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())[:64]


def alive(pid: int) -> bool:
    """Whether this machine runs a process of this id. A zombie process counts as dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
