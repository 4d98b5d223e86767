"""Restore many picture files: find them, choose the output paths, and report one line per file.

Results are written atomically.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from teasr.imaging import encoders, finding, formats, picture
from teasr.restore import outputs
from teasr.util.files import remove_strays
from teasr.util.output import lenient_output
from teasr.util.progress import ProgressLine, duration
from teasr.util.scratch import Scratch

TILES_SHARE = 0.95  # of the work on a picture; the rest is writing it


@dataclass(frozen=True)
class Job:
    """A file to restore and the path of its result. `problem`: why it is left out, if it is."""

    source: Path
    target: Path
    problem: str = ""


def jobs(inputs: Iterable[str], out: str | Path, suffix: str = "", kind: str | None = None) -> list[Job]:
    """Expand files, folders (searched recursively, keeping their sub-folders) and glob patterns into jobs.

    Files that cannot be read, such as a named pipe, and files that are reached a second time get a job with a
    `problem`. kind: output format, png, jpg, webp or tif; default: the format of the source. If there is a single input
    file, `out` may be a file name; with a slash at the end, it is a folder. Raises ValueError if an input matches no
    picture, if two results would have the same path, or for a wrong `out` (`outputs.single_file`).
    """
    sources, left_out = _once([each for text in inputs for each in _without_results(_expand(text), out)])
    if file := outputs.single_file(out, len(sources), suffix, kind):
        return [Job(sources[0][0], file), *left_out]
    out, by_target = Path(out), {}
    for source, name in sources:
        ending = formats.suffix_of(kind) if kind else formats.stored_suffix(source)
        job = Job(source, out / name.with_name(f"{name.stem}{suffix}{ending}"))
        if job.target in by_target:
            raise ValueError(
                f"{source} and {by_target[job.target].source} would both be written to {job.target}: "
                "use a separate output folder for each"
            )
        by_target[job.target] = job
    return [*by_target.values(), *left_out]


def _without_results(found: list[tuple[Path, Path, str]], out: str | Path) -> list[tuple[Path, Path, str]]:
    """Leave out what lies in an output folder that is part of the input folder: results of an earlier run."""
    inside, kept = os.path.realpath(out) + os.sep, []
    for source, name, problem in found:
        root = os.path.realpath(source.parents[len(name.parts) - 1]) + os.sep
        is_result = root != inside and inside.startswith(root) and os.path.realpath(source).startswith(inside)
        kept.append((source, name, problem or (finding.IN_OUTPUT if is_result else "")))
    return kept


def _once(found: list[tuple[Path, Path, str]]) -> tuple[list[tuple[Path, Path]], list[Job]]:
    """Split what `_expand` found into (path, path relative to the output folder) of every file, and jobs left out."""
    seen: dict[str, Path] = {}
    sources, left_out = [], []
    for source, name, problem in found:
        first = seen.setdefault(os.path.realpath(source), source) if not problem else source
        if problem or first is not source:
            problem = problem or f"duplicate: the same file as {first}"
            left_out.append(Job(Path(finding.printable(str(source))), name, problem))
        else:
            sources.append((source, name))
    return sources, left_out


def _expand(text: str) -> list[tuple[Path, Path, str]]:
    """Expand one input into files: (path, path relative to the output folder, why it is left out or an empty text)."""
    path = Path(text).expanduser()
    if path.is_dir():
        names, problems = finding.walk_pictures(path)
        found = [(path / name, Path(name), problem) for name, problem in [*((name, "") for name in names), *problems]]
    else:
        matches = [path] if path.is_file() else [match for match in _matches(path) if not match.is_dir()]
        found = [(match, Path(match.name), finding.unusable(match)) for match in matches]
    if all(problem for _, _, problem in found):
        more = f" ({found[0][0]}: {found[0][2]})" if found else ""
        raise ValueError(f"{text} is not an image, a folder of images or a pattern that matches images{more}")
    return found


def _matches(pattern: Path) -> list[Path]:
    """What a glob pattern matches, links last. `**` does not follow links to folders, since these may form a loop."""
    if "**" not in pattern.parts:
        return sorted(map(Path, glob.glob(str(pattern))), key=lambda match: (match.is_symlink(), match))
    at = pattern.parts.index("**")
    rest = [*pattern.parts[at:], *(["*"] if pattern.name == "**" else [])]
    found = []
    for base in map(Path, glob.glob(str(Path(*pattern.parts[:at])))):
        below = (match.relative_to(base) for match in base.glob("/".join(rest)))
        found += [base / name for name in below if not any(part.startswith(".") for part in name.parts)]
    return sorted(found, key=lambda match: (match.is_symlink(), match))


Restore = Callable[
    [picture.Picture, Callable[[int, int], None], Callable[[str], None], Scratch], picture.Picture
]  # restore(picture, on_progress, add_note, scratch)


@lenient_output()
def run(
    todo: list[Job],
    restore: Restore,
    skip_existing: bool = False,
    overwrite: bool = False,
    quality: int = encoders.QUALITY,
) -> int:
    """Restore all files and return how many failed. Prints one line per file; failures are reported and skipped.

    `restore(picture, on_progress, add_note, scratch)` calls `on_progress(done, all)` to report progress and
    `add_note(text)` to add a note to the file's line; a large result lies in `scratch`, a folder beside its file. A
    result that another program has written meanwhile is kept unless `overwrite`. quality: of JPEG and WebP.
    """
    failed, began, spent = 0, time.monotonic(), 0
    for folder in {job.target.parent for job in todo if not job.problem}:
        remove_strays(folder)
    with ProgressLine("restore", len(todo), "pictures", transient=True) as line:
        for i, job in enumerate(todo):
            head = f"{i + 1}/{len(todo)} {job.source}"
            if job.problem:
                failed += not job.problem.startswith(finding.HARMLESS)
                print(f"{head}: skipped: {job.problem}", flush=True)
                continue
            if skip_existing and os.path.isfile(job.target):
                print(f"{head}: skipped, the result already exists", flush=True)
                continue
            started, notes = time.monotonic(), []
            try:
                sizes = _restore_one(job, restore, partial(_show, line, i, job), notes, overwrite, quality)
            except (ValueError, OSError, MemoryError) as error:
                raced = skip_existing and isinstance(error, FileExistsError)
                failed += not raced
                print(f"{head}: {'skipped' if raced else 'failed'}: {_text(error)}", flush=True)
                continue
            spent += 1
            left = (time.monotonic() - began) / spent * (len(todo) - i - 1)
            parts = [sizes, f"{time.monotonic() - started:.1f} s", *notes, f"{duration(left)} left"]
            print(f"{head}: {', '.join(parts)}", flush=True)
    return failed


def _restore_one(
    job: Job, restore: Restore, show: Callable[[float], None], notes: list[str], overwrite: bool, quality: int
) -> str:
    """Restore a file and return the sizes of the picture before and after. show(share): called as the work goes on."""
    show(0)
    before = picture.read(job.source)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Scratch(job.target.parent)
    after = restore(before, lambda done, of: show(TILES_SHARE * done / of), notes.append, scratch)

    def on_rows(done: int, of: int) -> None:
        scratch.release()
        show(TILES_SHARE + (1 - TILES_SHARE) * done / of)

    picture.write(job.target, after, on_rows, overwrite, quality)
    return " -> ".join(f"{p.rgb.shape[1]}x{p.rgb.shape[0]}" for p in (before, after))


def _show(line: ProgressLine, before: int, job: Job, share: float) -> None:
    """Show the progress when `before` files and this share of the next one are done."""
    line.show(before + share, f"{finding.printable(job.source.name)} {share:.0%}")


def _text(error: Exception) -> str:
    if isinstance(error, FileExistsError):
        return f"{error.filename} was written by another program meanwhile and is kept"
    return str(error)
