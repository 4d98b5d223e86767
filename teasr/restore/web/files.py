"""What the web page does with its files: restore them one after the other, make small versions to show, and a ZIP."""

from __future__ import annotations

import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from teasr.imaging import formats, picture
from teasr.restore import frames
from teasr.restore.upscaler import Upscaler
from teasr.util.files import write_atomic
from teasr.util.scratch import Scratch

MOST_PIXELS = 200 * 10**6  # of a result: more would keep everybody else waiting
MOST_FILES = 50  # at once
KEPT_S = 3600  # how long uploads and results are kept
SHOWN_PX = 2048  # longer side of the pictures in the slider; the download has full size
RESULT = "result-"


@dataclass(frozen=True)
class Restored:
    """One restored file: its result, what is shown before and after, and a line about it."""

    path: Path
    shown: tuple[str, str]
    text: str


def work_folder(folder: Path) -> Path:
    """Make a new folder for the results of one request, and delete those that nobody has asked for since an hour."""
    for old in folder.glob(f"{RESULT}*"):
        if time.time() - old.stat().st_mtime > KEPT_S:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=folder, prefix=RESULT))


def restore(upscaler: Upscaler, path: Path, work: Path, how: dict, on_progress: Callable[[int, int], None]) -> Restored:
    """Restore a file into the folder `work`. how: arguments of `Upscaler.__call__`, `scale` among them.

    Raises ValueError for a file that is no picture or too large for the page, OSError if there is no room.
    """
    began, given = time.monotonic(), picture.layout(path)
    height, width = frames.size_of_result(given.height, given.width, how["scale"], None)
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"{given.width}x{given.height} px is too large for this page, whose results have at most "
            f"{MOST_PIXELS // 10**6} million pixels: use teasr upscale"
        )
    before, scratch = picture.read(path), Scratch(work)
    after = upscaler(before, on_progress=on_progress, scratch=scratch, **how)
    target = _free(work / f"{path.stem[:100]}_x{how['scale']:g}{_suffix(path, after)}")
    picture.write(target, after)
    shown = tuple(_show(target, side, made.rgb, width, height) for side, made in (("lq", before), ("hq", after)))
    seconds = time.monotonic() - began
    return Restored(target, shown, f"{given.width}x{given.height} → {width}x{height} px in {seconds:.1f} s")


def packed(files: Iterable[Path], work: Path) -> Path:
    """Write the files into one ZIP, not compressed again, and return its path."""
    target = work / "restored.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for file in files:
            archive.write(file, file.name)
    return target


def _free(path: Path) -> Path:
    """Return the path, or one with a number if there is such a file already: two uploads may have the same name."""
    names = (path.with_name(f"{path.stem}{f'-{n}' if n > 1 else ''}{path.suffix}") for n in range(1, MOST_FILES + 2))
    return next(name for name in names if not name.exists())


def _suffix(path: Path, result: picture.Picture) -> str:
    """Return the suffix of the source, or .png if its format cannot hold the result or is not ours to write."""
    suffix = formats.stored_suffix(path)
    try:
        formats.check(Path(f"x{suffix}"), result.layout)
    except ValueError:
        return ".png"
    return suffix


def _show(target: Path, side: str, x: np.ndarray, width: int, height: int) -> str:
    """Write a version for the slider, which needs two pictures of the same size, and return its path."""
    factor = min(1.0, SHOWN_PX / max(width, height))
    x = (x >> 8).astype(np.uint8) if x.dtype == np.uint16 else x
    x = cv2.resize(x, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_CUBIC)
    path = target.parent / "shown" / f"{target.name}-{side}.png"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, cv2.imencode(".png", np.ascontiguousarray(x[..., ::-1]))[1].tobytes())
    return str(path)
