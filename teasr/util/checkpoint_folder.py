"""Atomic folders with a hash manifest, used for training checkpoints and saved models.

A folder is written under a temporary name, hashed, synced to disk and renamed; it is verified when it is read. Reading
one requires no training code.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from teasr.util.files import sha256_of, sync_folder, write_atomic

MANIFEST = "MANIFEST.json"


def name_of(update: int) -> str:
    """Folder name of the checkpoint after `update` updates."""
    return f"step-{update:08d}"


def commit(temporary: Path, final: Path) -> None:
    """Hash and sync every file, then rename the folder. The checkpoint exists only after the rename."""
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        files[path.relative_to(temporary).as_posix()] = [path.stat().st_size, sha256_of(path)]
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    write_atomic(temporary / MANIFEST, json.dumps(files, indent=1).encode())
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    sync_folder(final.parent)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file has the size and hash in the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, (size, sha256) in files.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            if sha256_of(folder / name) != sha256:
                return f"{name} has changed"
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    return None


def run_folder(folder: Path) -> Path:
    """The run folder of a checkpoint, or `folder` itself if it is not inside `checkpoints/`."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint in `root`, or None. Damaged checkpoints are reported and skipped."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        wrong = problem(folder)
        if wrong is None:
            return folder
        print(f"checkpoint {folder} is damaged ({wrong}): using an older one", flush=True)
    return None


def resolve(path: Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint if it is a run folder.

    Raises ValueError when the checkpoint is damaged or none is found.
    """
    if (path / MANIFEST).is_file():
        wrong = problem(path)
        if wrong:
            raise ValueError(f"checkpoint {path} is damaged ({wrong}): choose another checkpoint")
        return path
    found = latest(path / "checkpoints")
    if found is None:
        raise ValueError(
            f"{path} is neither a checkpoint nor a run folder with a complete one (checkpoints/step-*/{MANIFEST})"
        )
    return found
