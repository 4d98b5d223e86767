"""Checkpoint folders that are complete or do not count: written aside, hashed, synced, renamed; the last k are kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from teasr.distributed import World
from teasr.files import sync_folder, write_atomic

MANIFEST = "MANIFEST.json"


def name_of(update: int) -> str:
    """Folder name of the checkpoint after `update` updates."""
    return f"step-{update:08d}"


@contextmanager
def writing(root: Path, update: int, world: World, keep: int) -> Iterator[Path]:
    """A temporary folder for all ranks to fill; committed under its final name when the block ends without error."""
    temporary, final = root / f".tmp-{name_of(update)}", root / name_of(update)
    if world.main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    yield temporary
    world.barrier()
    if world.main:
        commit(temporary, final)
        prune(root, keep)
    world.barrier()


def commit(temporary: Path, final: Path) -> None:
    """Hash and sync every file, then rename: the rename is what makes the checkpoint exist."""
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        with open(path, "rb+") as file:
            files[path.relative_to(temporary).as_posix()] = [
                path.stat().st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
            ]
            os.fsync(file.fileno())
    write_atomic(temporary / MANIFEST, json.dumps(files, indent=1).encode())
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    sync_folder(final.parent)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and leftovers of interrupted saves."""
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is there with its size and hash."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, (size, sha256) in files.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return f"{name} has changed"
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    return None


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`; damaged ones are named and passed over."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        wrong = problem(folder)
        if wrong is None:
            return folder
        print(f"checkpoint {folder} is damaged ({wrong}): using an older one", flush=True)
    return None


def resolve(path: Path) -> Path:
    """A checkpoint folder from itself, or the newest one of a run folder. ValueError says what was looked for."""
    if (path / MANIFEST).is_file():
        wrong = problem(path)
        if wrong:
            raise ValueError(f"checkpoint {path} is damaged: {wrong}")
        return path
    found = latest(path / "checkpoints")
    if found is None:
        raise ValueError(f"{path} is neither a checkpoint nor a run folder with one (checkpoints/step-*/{MANIFEST})")
    return found
