"""What each file format can hold. Known before a picture is restored, so that it is said before the work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Format:
    """A format in which results are written."""

    suffixes: tuple[str, ...]  # the first one is used unless the source has another
    side_px: int  # longest side
    area_px: int  # most pixels
    alpha: bool
    deep: bool  # 16 bits per channel
    lossy: bool = False  # written with a quality


FORMATS = {
    "png": Format((".png",), 2**31 - 1, 2**62, alpha=True, deep=True),
    "jpg": Format((".jpg", ".jpeg"), 65535, 2**62, alpha=False, deep=False, lossy=True),
    # a larger WebP may overflow its first partition
    "webp": Format((".webp",), 16383, 2**27, alpha=True, deep=False, lossy=True),
    "tif": Format((".tif", ".tiff"), 2**31 - 1, 2**62, alpha=True, deep=True),
}


@dataclass(frozen=True)
class Layout:
    """Size of a picture in pixels, whether it has an alpha channel, and whether it has 16 bits per channel."""

    width: int
    height: int
    alpha: bool
    deep: bool


def suffix_of(kind: str) -> str:
    """Return the suffix of a format, a key of FORMATS."""
    return FORMATS[kind].suffixes[0]


def kind_of(path: Path) -> str:
    """Return the key of FORMATS for a file name. Raises ValueError for an unknown suffix."""
    for kind, known in FORMATS.items():
        if path.suffix.lower() in known.suffixes:
            return kind
    raise ValueError(f"{path}: unknown suffix; images are written as {', '.join(map(suffix_of, FORMATS))}")


def stored_suffix(path: Path) -> str:
    """Return the suffix for the result: that of the source file, or .png for formats that cannot be written."""
    return path.suffix if any(path.suffix.lower() in known.suffixes for known in FORMATS.values()) else ".png"


def check(path: Path, layout: Layout) -> None:
    """Raise ValueError, naming the formats that can, if that of `path` cannot hold a picture of this layout."""
    kind = kind_of(path)
    problem = _problem(kind, layout)
    if problem:
        able = [other for other in FORMATS if _problem(other, layout) is None]
        raise ValueError(f"{path}: {problem}; choose {' or '.join(able)}")


def _problem(kind: str, layout: Layout) -> str | None:
    known = FORMATS[kind]
    if layout.alpha and not known.alpha:
        return "JPEG cannot store transparency"
    if layout.deep and not known.deep:
        return f"{kind} stores 8 bits per channel, but the image has 16"
    size = f"but the result has {layout.width}x{layout.height} px"
    if max(layout.width, layout.height) > known.side_px:
        return f"{kind} stores at most {known.side_px} px along a side, {size}"
    if layout.width * layout.height > known.area_px:
        return f"{kind} stores at most {known.area_px / 1e6:.0f} million pixels for certain, {size}"
    return None
