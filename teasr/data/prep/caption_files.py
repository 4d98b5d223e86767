"""Captions of photographs: the text file beside each one, as trainers of LoRAs have it (photo.txt for photo.jpg)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from teasr.data.prep.sources import Photo
from teasr.util.files import unusual

MOST_BYTES = 16_384  # far more than any text encoder reads; a longer file is something else


def with_captions(photos: list[Photo], folder: Path, default: str | None) -> list[Photo]:
    """Return the photographs of a folder with their captions; `default` is that of photographs without a text file.

    Raises ValueError that names the first one without a caption, or a text file that cannot be used.
    """
    captions = [_caption(folder / photo.name, default) for photo in photos]
    lacking = [photo.name for photo, caption in zip(photos, captions, strict=True) if caption is None]
    if lacking:
        path = _path(folder / lacking[0])
        raise ValueError(
            f"{len(lacking)} of {len(photos)} photographs have no caption, the first is {lacking[0]}: write it into "
            f"{path}, set caption_default='a photograph' for all of them, or leave captions=files out"
        )
    return [replace(photo, caption=caption) for photo, caption in zip(photos, captions, strict=True)]


def _path(photo: Path) -> Path:
    return photo.with_suffix(".txt")


def _caption(photo: Path, default: str | None) -> str | None:
    """Return the words of the text file beside a photograph, on one line; `default` if there is none or it is empty."""
    path = _path(photo)
    if not path.exists():
        return default
    if reason := unusual(path):
        raise ValueError(f"the caption {path} cannot be used: {reason}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the caption {path} cannot be read ({error}): write it as UTF-8 text") from None
    if len(text) > MOST_BYTES:
        raise ValueError(f"the caption {path} has {len(text)} characters: write a sentence or two, or rename the file")
    return " ".join(text.split()) or default
