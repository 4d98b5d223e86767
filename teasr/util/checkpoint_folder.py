"""Atomic folders with a hash manifest, used for training checkpoints and saved models.

A folder is written under a temporary name, hashed, synced to disk and renamed; it is verified when it is read. Reading
one requires no training code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from itertools import count
from pathlib import Path

from teasr.util.files import sha256_of, sync_folder, write_atomic

MANIFEST = "MANIFEST.json"
CARD = "README.md"
NAME = re.compile(r"step-(\d{8,})")


def name_of(update: int) -> str:
    """Folder name of the checkpoint after `update` updates."""
    return f"step-{update:08d}"


def update_of(folder: Path) -> int:
    """The update of a checkpoint, by its name."""
    return int(NAME.fullmatch(folder.name)[1])


def updates_of(root: Path) -> dict[int, Path]:
    """The checkpoint folders in `root` by update, oldest first. Other folders, such as copies, are left out."""
    found = {int(match[1]): path for path in root.glob("step-*") if (match := NAME.fullmatch(path.name))}
    return {update: found[update] for update in sorted(found)}


def commit(temporary: Path, final: Path) -> None:
    """Hash and sync every file, then rename the folder. The checkpoint exists only after the rename.

    The model card, whose text its publisher edits, is not part of the manifest.

    All files get the permissions that the user's umask allows; safetensors makes them readable for their owner alone.
    """
    paths, files = sorted(p for p in temporary.rglob("*") if p.is_file()), {}
    for path in paths:
        if path.name != CARD:
            files[path.relative_to(temporary).as_posix()] = [path.stat().st_size, sha256_of(path)]
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    write_atomic(temporary / MANIFEST, json.dumps(files, indent=1).encode())
    mode = (temporary / MANIFEST).stat().st_mode & 0o777
    for path in paths:
        path.chmod(mode)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    sync_folder(final.parent)


def problem(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file has the size and hash in the manifest.

    hashes: false compares sizes only, which is quick.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())
        if not files:
            return f"{MANIFEST} lists no files"
        for name, (size, sha256) in files.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            if hashes and sha256_of(folder / name) != sha256:
                return f"{name} has changed"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return str(error)
    return None


def run_folder(folder: Path) -> Path:
    """The run folder of a checkpoint, or `folder` itself if it is not inside `checkpoints/`."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def newest_intact(root: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest complete checkpoint in `root`, or None, and what is wrong with each of the newer ones."""
    damaged = {}
    for folder in reversed(updates_of(root).values()):
        wrong = problem(folder)
        if wrong is None:
            return folder, damaged
        damaged[folder] = wrong
    return None, damaged


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint in `root`, or None. Damaged checkpoints are reported and skipped."""
    found, damaged = newest_intact(root)
    for folder, wrong in damaged.items():
        print(f"checkpoint {folder} is damaged ({wrong}){': using an older one' if found else ''}", flush=True)
    return found


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint, for example to damaged-step-00000500, so that it no longer counts; return its new path."""
    names = (f"{why}-{folder.name}{f'-{n}' if n > 1 else ''}" for n in count(1))
    target = next(path for name in names if not (path := folder.with_name(name)).exists())
    os.rename(folder, target)
    return target


def resolve(path: Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint if it is a run folder.

    Raises ValueError when the checkpoint is damaged or none is found.
    """
    if (path / MANIFEST).is_file():
        wrong = problem(path)
        if wrong:
            raise ValueError(f"checkpoint {path} is damaged ({wrong}): choose another checkpoint")
        return path
    root = path / "checkpoints"
    found = latest(root)
    if found is None and updates_of(root):
        raise ValueError(f"every checkpoint in {root} is damaged: put back a copy of one, or choose another model")
    if found is None:
        raise ValueError(
            f"{path} is neither a checkpoint nor a run folder with a complete one (checkpoints/step-*/{MANIFEST})"
        )
    return found
