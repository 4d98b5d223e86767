"""Check where results go before the first picture is restored, so that no work is lost to a mistake that was known."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from teasr.imaging import formats, picture
from teasr.imaging.encoders import QUALITY
from teasr.imaging.formats import Layout
from teasr.util.files import check_writable

NAME_BYTES = 255  # the longest file name that common file systems allow
ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}")  # of a file's name; a folder may be called results_v1.2


def single_file(out: str | Path, images: int, suffix: str, kind: str | None) -> Path | None:
    """Return `out` as the path of a result, or None if it is a folder, which may not exist yet.

    images: their number. suffix, kind: as in `batch.jobs`. Raises ValueError for the name of a file that cannot be
    meant.
    """
    path = Path(out)
    if path.is_dir() or str(out).endswith(os.sep) or not (path.is_file() or ENDING.fullmatch(path.suffix)):
        return None
    hint = f"for a folder of that name, write {out}{os.sep}"
    try:
        named = formats.kind_of(path)
    except ValueError as error:
        raise ValueError(f"{error}; {hint}") from None
    if images > 1:
        raise ValueError(f"{out} is the name of one file, but there are {images} images: give a folder ({hint})")
    if kind not in (None, named):
        raise ValueError(f"the output file {out} is not of the format {kind}: change one of the two")
    if suffix:
        raise ValueError(f"the suffix {suffix} is for results in a folder: make it part of the file name {out}")
    return path


def check_targets(pairs: Iterable[tuple[Path, Path]], skip_existing: bool, overwrite: bool) -> None:
    """Check that every result can be written and replaces nothing that it must not.

    pairs: of source and target. Raises ValueError for a result that exists, unless existing ones are to be skipped or
    overwritten, and for one that would replace an image that is still to be read; OSError for a folder that cannot be
    written to.
    """
    pairs = list(pairs)
    sources = {os.path.realpath(source): source for source, _ in pairs}
    existing, folders = [], {}
    for source, target in pairs:
        if len(os.fsencode(target.name)) > NAME_BYTES:
            raise ValueError(f"the result of {source} would have a name of more than {NAME_BYTES} bytes: {target.name}")
        if os.path.isdir(target):
            raise ValueError(f"the result of {source} would be written to {target}, which is a folder")
        other = sources.get(os.path.realpath(target))
        if other is not None:
            whose = "its own result" if other == source else f"the result of {source}"
            raise ValueError(f"{other} would be overwritten by {whose}: choose another output folder, or add --suffix")
        existing += [target] if os.path.lexists(target) else []
        folders.setdefault(target.parent, target)
    if existing and not (skip_existing or overwrite):
        raise ValueError(
            f"{len(existing)} of {len(pairs)} results exist already, such as {existing[0]}: add --skip-existing to "
            "keep them, or --overwrite to replace them"
        )
    for target in folders.values():
        check_writable(target)


def check_quality(quality: int | None, targets: Iterable[Path]) -> int:
    """Return the quality of JPEG and WebP, by default 95. Raises ValueError if it is out of range or not of use."""
    if quality is None:
        return QUALITY
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality {quality}: must be a whole number from 1 to 100")
    if not any(formats.FORMATS[formats.kind_of(target)].lossy for target in targets):
        raise ValueError(f"--quality {quality} is for JPEG and WebP, and no result is one: add --format jpg or webp")
    return quality


def check_formats(
    pairs: Iterable[tuple[Path, Path]], size_of_result: Callable[[int, int], tuple[int, int]], skip_existing: bool
) -> None:
    """Raise ValueError if the format of a result cannot hold it, as far as the header of its source tells.

    size_of_result(height, width): of the result of a picture. Files that cannot be read are left to `batch.run`, which
    reports and skips them.
    """
    for source, target in pairs:
        if formats.kind_of(target) in ("png", "tif") or (skip_existing and os.path.isfile(target)):
            continue
        try:
            given = picture.layout(source)
            height, width = size_of_result(given.height, given.width)
        except ValueError:
            continue
        formats.check(target, Layout(width, height, given.alpha, given.deep))
