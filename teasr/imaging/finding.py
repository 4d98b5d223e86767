"""Find the picture files below a folder, without waiting at a named pipe or following links in circles."""

from __future__ import annotations

import os
from pathlib import Path

from teasr.imaging.images import MAX_PIXELS, SUFFIXES
from teasr.util.files import unusual

MAX_BYTES = 10 * MAX_PIXELS  # more than any picture of so many pixels takes: 16 bit, four channels
IN_OUTPUT = "it lies in the output folder"
HARMLESS = ("link to a folder", "duplicate", IN_OUTPUT)  # reasons for leaving something out that lose no picture


def walk_pictures(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """List all picture files below a folder, sorted, and (name, reason) for everything that was left out.

    Links to folders are not followed; of a file and the links to it, one is listed. Every listed file can be read
    without waiting, and its name can be printed. The reasons that begin with a text of `HARMLESS` lose no
    picture.
    """
    names, unreadable, links = [], [], []
    for root, folders, files in os.walk(folder, onerror=unreadable.append):
        names += [os.path.join(root, f) for f in files if Path(f).suffix.lower() in SUFFIXES]
        links += [os.path.join(root, f) for f in folders if os.path.islink(os.path.join(root, f))]
    problems = [(error.filename, f"folder cannot be read: {error.strerror}") for error in unreadable]
    problems += [(link, "link to a folder: not followed; give the linked folder itself") for link in links]

    def below(path: str) -> str:
        return Path(path).relative_to(folder).as_posix()

    used, left_out = _usable(folder, list(map(below, names)))
    left_out += [(below(path), reason) for path, reason in problems]
    return sorted(used), sorted((printable(name), why) for name, why in left_out)


def _usable(folder: Path, names: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split the names of files into those to read, and (name, reason) of the others."""
    seen: dict[str, str] = {}
    used, left_out, root = [], [], os.path.realpath(folder)
    for name in sorted(names, key=lambda name: (os.path.islink(os.path.join(root, name)), name)):
        path = os.path.join(root, name)
        real = os.path.realpath(path) if os.path.islink(path) else path
        reason = unusable(path) or (f"duplicate: a link to {seen[real]}" if real in seen else "")
        if reason:
            left_out.append((name, reason))
        else:
            seen[real] = name
            used.append(name)
    return used, left_out


def unusable(path: Path | str) -> str:
    """Why a file is not read as a picture: a named pipe, a broken link, its size or its name; empty if it is read."""
    reason = unusual(path)
    if not reason and printable(str(path)) != str(path):
        reason = "name is not valid UTF-8: rename it"
    if not reason and os.path.getsize(path) > MAX_BYTES:
        reason = f"too large: more than {MAX_BYTES / 1e9:.1f} GB"
    return reason


def printable(name: str) -> str:
    """The name of a file with the bytes escaped that are not UTF-8."""
    return name.encode(errors="backslashreplace").decode()
