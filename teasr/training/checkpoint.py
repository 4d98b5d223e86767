"""Write the checkpoints of a run and keep the last k and the best. A full disk never destroys an older checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from teasr.util.checkpoint_folder import commit, name_of

BEST = "best"


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
            raise OSError(errno.ENOSPC, f"{needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")

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
        """Publish the checkpoint, then remove all checkpoints except the newest `keep` and the best."""
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
    """Remove all checkpoints except the newest `keep` and the best, and the leftovers of interrupted saves.

    The symbolic link `best` is updated to point to the best checkpoint.
    """
    folders = sorted(root.glob("step-*"))
    scores = {folder: score for folder in folders if (score := score_of(folder)) is not None}
    best = max(scores, key=scores.get, default=None)
    for old in folders[:-keep]:
        if old != best:
            shutil.rmtree(old)
    for leftover in root.glob(".tmp-*"):
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)
    if best is not None:
        link = root / ".tmp-best"
        link.symlink_to(best.name)
        os.replace(link, root / BEST)


def score_of(folder: Path) -> float | None:
    """Preview score of a checkpoint, or None if it has none."""
    try:
        return json.loads((folder / "state.json").read_text()).get("score")
    except (OSError, ValueError):
        return None
