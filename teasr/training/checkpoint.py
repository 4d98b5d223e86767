"""Write the checkpoints of a run; keep the last k, the best, and the newest that is proven to be good.

A checkpoint is proven when the losses and gradients of an update after it were finite. A full disk or a run that
diverges never destroys an older checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from teasr.util.checkpoint_folder import commit, name_of, problem, updates_of

BEST, PROVEN = "best", "proven"  # symbolic links to checkpoints


class Writer:
    """Writes one checkpoint from one process: files go to a temporary folder, which `commit` renames.

    The first OSError is stored in `problem`; every later call does nothing.
    """

    def __init__(self, root: Path, update: int, needed_bytes: int = 0):
        """`needed_bytes`: fail immediately if the disk has less free space."""
        self.temporary, self.final = root / f".tmp-{name_of(update)}", root / name_of(update)
        self.problem: str | None = None
        self._try(self._begin, root, needed_bytes)

    def _begin(self, root: Path, needed_bytes: int) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        free = shutil.disk_usage(root).free
        if free < needed_bytes:
            raise OSError(errno.ENOSPC, f"{needed_bytes / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free")

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Add a safetensors file."""
        self._try(self._save, self.temporary / name, tensors)

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            save_file({name: x.contiguous().cpu() for name, x in tensors.items()}, path)
        except SafetensorError as error:  # safetensors raises this when the disk is full
            raise OSError(errno.EIO, str(error)) from error

    def text(self, name: str, text: str) -> None:
        """Add a text file."""
        self._try((self.temporary / name).write_text, text)

    def commit(self, keep: int) -> None:
        """Publish the checkpoint, then remove all checkpoints that `prune` does not keep."""
        self._try(commit, self.temporary, self.final)
        if self.problem is None:
            self._try(prune, self.final.parent, keep)

    def _try(self, act: Callable, *arguments: object) -> None:
        if self.problem is None:
            try:
                act(*arguments)
            except OSError as error:
                self.problem = f"{error.strerror or error}"
                shutil.rmtree(self.temporary, ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Remove all checkpoints except the newest `keep`, the best and the proven one, and leftovers of killed saves.

    Damaged checkpoints do not count and are not removed. The link `best` is updated.
    """
    folders = [folder for folder in updates_of(root).values() if problem(folder, hashes=False) is None]
    scores = {folder: score for folder in folders if (score := score_of(folder)) is not None}
    best = max(scores, key=scores.get, default=None)
    for old in folders[:-keep]:
        if old not in (best, proven(root)):
            os.rename(old, root / f".tmp-old-{old.name}")  # at once: a kill does not leave half a checkpoint
    for leftover in root.glob(".tmp-*"):
        folder = leftover.is_dir() and not leftover.is_symlink()
        shutil.rmtree(leftover) if folder else leftover.unlink()
    if best is not None:
        _link(root, BEST, best.name)


def prove(root: Path, update: int, keep: int) -> None:
    """Record that the checkpoint of `update` is good, and remove those that `prune` no longer keeps.

    If that is not possible, for example on a full disk, the older record stays until the next checkpoint is proven.
    """
    with contextlib.suppress(OSError):
        _link(root, PROVEN, name_of(update))
        prune(root, keep)


def proven(root: Path) -> Path | None:
    """The newest checkpoint that is recorded as good, or None."""
    link = root / PROVEN
    return root / link.readlink() if link.is_symlink() and link.is_dir() else None


def _link(root: Path, name: str, target: str) -> None:
    new = root / f".tmp-{name}"
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, root / name)


def score_of(folder: Path) -> float | None:
    """Preview score of a checkpoint, or None if it has none or it is not finite."""
    try:
        score = json.loads((folder / "state.json").read_text()).get("score")
    except (OSError, ValueError):
        return None
    return score if isinstance(score, float) and math.isfinite(score) else None
