"""What would end a run after hours and can be found out in a moment before it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch


def writable(run_dir: Path) -> None:
    """ValueError unless files can be made in the run folder, which is made if need be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise ValueError(
            f"run_dir = {run_dir} cannot be written ({error.strerror or error}): make room or choose another run_dir"
        ) from None


def room(folder: Path, checkpoint_bytes: int, keep: int) -> str | None:
    """ValueError when not one checkpoint fits on the disk of `folder`; a warning when not all that will be kept do."""
    free, gb = shutil.disk_usage(folder).free, 1e9
    if free < checkpoint_bytes:
        raise ValueError(
            f"a checkpoint takes {checkpoint_bytes / gb:.2f} GB and the disk of {folder} has {free / gb:.2f} GB free: make room or "
            "choose another run_dir"
        )
    lying = len(list((folder / "checkpoints").glob("step-*")))
    wanted = checkpoint_bytes * max(1, keep + 2 - lying)  # one in the making and the best one beside them
    if free < wanted:
        return f"checkpoints will take {wanted / gb:.2f} GB more, the disk of {folder} has {free / gb:.2f} GB free"
    return None


def precision(*dtypes: str | None) -> None:
    """ValueError when the network is to compute in bf16 and the GPU cannot."""
    if "bf16" in dtypes and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"{torch.cuda.get_device_name()} does not compute in bf16 (Ampere, from 2020, is the first that does): take another GPU, "
            "or fp32 where the model is small"
        )
