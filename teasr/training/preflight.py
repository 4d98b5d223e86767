"""Quick checks before a run for problems that would otherwise end it hours later: disk and numerical precision."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import psutil
import torch

from teasr.util import checkpoint_folder


def writable(run_dir: Path) -> None:
    """Raise ValueError unless files can be written in the run folder, which is created if it does not exist."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        raise ValueError(
            f"run_dir = {run_dir} cannot be written ({error.strerror or error}): make it a writable folder with free "
            "space, or choose another run_dir"
        ) from None


def room(folder: Path, checkpoint_bytes: int, keep: int) -> str | None:
    """Check that checkpoints fit on the disk of `folder`.

    Raises ValueError when there is no room for a single checkpoint; returns a warning when there is not enough room
    for all that will be kept, and None otherwise.
    """
    free, gb = shutil.disk_usage(folder).free, 1e9
    if free < checkpoint_bytes:
        raise ValueError(
            f"a checkpoint takes {checkpoint_bytes / gb:.2f} GB and the disk of {folder} has {free / gb:.2f} GB free: "
            "free disk space or choose another run_dir"
        )
    existing = len(checkpoint_folder.updates_of(folder / "checkpoints"))
    wanted = checkpoint_bytes * max(1, keep + 2 - existing)  # plus the one being written and the best one
    if free < wanted:
        return (
            f"checkpoints will take {wanted / gb:.2f} GB more, but the disk of {folder} has {free / gb:.2f} GB free: "
            "free disk space, lower train.keep_checkpoints or choose another run_dir"
        )
    return None


def batch_fits(images: int, height: int, width: int, device: torch.device) -> None:
    """Raise ValueError unless the pairs of one update on this rank (`images` of them) fit into the device's memory.

    They are all read before the update, as uint8 and as float32.
    """
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    needed = images * height * width * 3 * 2 * (1 + 4)
    if needed > total:
        raise ValueError(
            f"train.batch: the {images:,} pairs of {height}x{width} px that each rank reads for one update take "
            f"{needed / 1e9:,.0f} GB, and {'the GPU' if on_gpu else 'this machine'} has {total / 1e9:,.0f} GB of "
            "memory: lower train.batch or use more ranks"
        )


def precision(*dtypes: str | None) -> None:
    """Raise ValueError when one of `dtypes` is "bf16" and the GPU does not support it."""
    if "bf16" in dtypes and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"{torch.cuda.get_device_name()} does not support bf16 (Ampere GPUs and later do): use another GPU, "
            "or set train.dtype or backbone.dtype to fp32 if the model is small enough"
        )
