"""Restore many picture files: find them, choose the output paths, and report one line per file.

Results are written atomically.
"""

from __future__ import annotations

import glob
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from teasr.imaging import images, picture
from teasr.util.progress import duration


@dataclass(frozen=True)
class Job:
    """A file to restore and the path of its result."""

    source: Path
    target: Path


def jobs(inputs: Iterable[str], out: Path, suffix: str = "", kind: str | None = None) -> list[Job]:
    """Expand files, folders (searched recursively, keeping their sub-folders) and glob patterns into jobs.

    kind: output format, png, jpg, webp or tif; default: the format of the source. If there is a single input file,
    `out` may be a file name. Raises ValueError if an input matches no picture, if two results would have the same path,
    or if a result would overwrite its source.
    """
    sources = [pair for text in inputs for pair in _expand(text)]
    if len(sources) == 1 and sources[0][0].is_file() and out.suffix.lower() in images.SUFFIXES and not out.is_dir():
        return [Job(sources[0][0], out)]
    by_target: dict[Path, Job] = {}
    for source, name in sources:
        ending = picture.FORMATS[kind] if kind else picture.stored_suffix(source)
        job = Job(source, out / name.with_name(f"{name.stem}{suffix}{ending}"))
        if job.target in by_target:
            raise ValueError(
                f"{source} and {by_target[job.target].source} would both be written to {job.target}: "
                "use a separate output folder for each"
            )
        if job.target.resolve() == source.resolve():
            raise ValueError(
                f"{source} would be overwritten by its own result: choose another output folder, or add --suffix"
            )
        by_target[job.target] = job
    return list(by_target.values())


def _expand(text: str) -> list[tuple[Path, Path]]:
    """Expand one input into pairs of a file and its path relative to the output folder."""
    path = Path(text).expanduser()
    if path.is_dir():
        names, _ = images.walk_pictures(path)
        found = [(path / name, Path(name)) for name in names]
    elif path.is_file():
        found = [(path, Path(path.name))]
    else:
        found = [
            (Path(p), Path(Path(p).name)) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()
        ]
    if not found:
        raise ValueError(f"{text} is not an image, a folder of images or a pattern that matches images")
    return found


ProgressCallback = Callable[[int, int], None]
NoteCallback = Callable[[str], None]


def run(
    todo: list[Job],
    restore: Callable[[picture.Picture, ProgressCallback, NoteCallback], picture.Picture],
    skip_existing: bool = False,
) -> int:
    """Restore all files and return how many failed. Prints one line per file; failures are reported and skipped.

    `restore(picture, on_progress, add_note)` calls `on_progress(done, all)` to report progress (shown only on a
    terminal) and `add_note(text)` to add a note to the file's line.
    """
    failed, began, spent = 0, time.monotonic(), 0
    for i, job in enumerate(todo):
        head = f"{i + 1}/{len(todo)} {job.source}"
        if skip_existing and job.target.is_file():
            print(f"{head}: skipped, the result already exists", flush=True)
            continue
        started, notes = time.monotonic(), []
        line = Inside(head)
        try:
            before = picture.read(job.source)
            after = restore(before, line.show, notes.append)
            picture.write(job.target, after)
        except (ValueError, OSError, MemoryError) as error:
            failed += 1
            line.clear()
            print(f"{head}: failed: {error}", flush=True)
            continue
        spent += 1
        line.clear()
        left = (time.monotonic() - began) / spent * (len(todo) - i - 1)
        sizes = " -> ".join(f"{p.rgb.shape[1]}x{p.rgb.shape[0]}" for p in (before, after))
        parts = [sizes, f"{time.monotonic() - started:.1f} s", *notes, f"{duration(left)} left"]
        print(f"{head}: {', '.join(parts)}", flush=True)
    return failed


class Inside:
    """Progress and remaining time within one picture, shown only on a terminal."""

    def __init__(self, head: str):
        self.head, self.began, self.drawn = head, time.monotonic(), 0.0
        self.terminal = sys.stdout.isatty()

    def show(self, done: int, of: int) -> None:
        """Report that `done` of `of` parts are finished."""
        now = time.monotonic()
        if self.terminal and now - self.drawn > 0.2:
            self.drawn = now
            left = (now - self.began) / done * (of - done)
            print(f"\r\033[K{self.head}: {done / of:.0%}, {duration(left)} left", end="", flush=True)

    def clear(self) -> None:
        """Erase the progress line, before the file's own line is printed."""
        if self.drawn:
            print("\r\033[K", end="", flush=True)
