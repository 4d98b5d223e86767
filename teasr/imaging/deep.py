"""Decode pictures that Pillow reads not at all or with 8 bits: PNG and TIFF of 16 bits per channel, CIELAB, YCbCr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from teasr.imaging import images, spaces, tiff
from teasr.imaging.formats import Layout


@dataclass(frozen=True)
class Decoded:
    """A picture as it is stored, perhaps lying on its side: RGB [H, W, 3], alpha [H, W], and what describes them."""

    rgb: np.ndarray
    alpha: np.ndarray | None
    grey: bool
    profile: bytes | None
    exif: Image.Exif


def check_size(width: int, height: int) -> None:
    """Raise Pillow's error for a picture of too many pixels."""
    if width * height > images.MAX_PIXELS:
        raise Image.DecompressionBombError(f"{width}x{height} px exceeds the limit of {images.MAX_PIXELS} px")


def png_depth(file: BinaryIO) -> int:
    """Return the bits per channel of a PNG, 0 for another file."""
    file.seek(0)
    head = file.read(25)
    return head[24] if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 25 else 0


def read_png(file: BinaryIO, opened: Image.Image) -> Decoded:
    """Decode a PNG of 16 bits; `opened` is its header. Raises ValueError if it is damaged."""
    file.seek(0)
    x = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if x is None:
        raise ValueError("truncated or damaged data")
    x = x[..., None] if x.ndim == 2 else x
    alpha = x[..., 3] if x.shape[2] == 4 else None
    if x.shape[2] == 1 and "transparency" in opened.info:
        alpha = np.where(x[..., 0] == opened.info["transparency"], 0, 65535).astype(np.uint16)
    rgb = np.repeat(x, 3, 2) if x.shape[2] == 1 else x[..., 2::-1]
    file.seek(25)
    grey = file.read(1) in (b"\0", b"\4")  # the colour type of the header
    return Decoded(rgb, alpha, grey, opened.info.get("icc_profile"), opened.getexif())


def tiff_tags(file: BinaryIO) -> tiff.Directory | None:
    """Return the tags of a TIFF that `read_tiff` reads; None for another file, which Pillow may read.

    Raises ValueError for several pages, and like `check_size`.
    """
    file.seek(0)
    tags = tiff.Directory(file) if file.read(4) in tiff.MARKS else None
    if tags is None or not tiff.beyond_pillow(tags):
        return None
    if tags.several_pages:
        raise ValueError("it has several pages")
    check_size(tags.value(tiff.WIDTH), tags.value(tiff.HEIGHT))
    return tags


def tiff_layout(tags: tiff.Directory) -> Layout:
    """Return the layout of the picture that `read_tiff` returns, turned upright."""
    size = tags.value(tiff.WIDTH), tags.value(tiff.HEIGHT)
    turned = tags.value(images.ORIENTATION, 1) >= 5
    return Layout(*(size[::-1] if turned else size), _alpha(tags) is not None, set(tags.values(tiff.BITS)) == {16})


def read_tiff(file: BinaryIO, tags: tiff.Directory) -> Decoded:
    """Decode a TIFF; alpha that the colours were multiplied by is divided out. Raises OSError if it is damaged."""
    file.seek(0)
    x = tiff.read_samples(file.read(), tags)
    exif, profile, space = _exif(file, tags), tags.raw(tiff.PROFILE), tags.value(tiff.PHOTOMETRIC)
    if space in (tiff.CIELAB, tiff.ICCLAB):
        return Decoded(spaces.lab_to_rgb(x[..., :3], space == tiff.ICCLAB), None, False, None, exif)
    if space == tiff.WHITE_IS_ZERO:
        x = np.iinfo(x.dtype).max - x
    rgb, alpha = (np.repeat(x, 3, 2) if x.shape[2] == 1 else x[..., :3]), None
    if _alpha(tags) is not None:
        alpha = x[..., 3]
        rgb = spaces.unmultiplied(rgb, alpha) if _alpha(tags) == tiff.ASSOCIATED else rgb
    return Decoded(rgb, alpha, x.shape[2] == 1, profile, exif)


def _alpha(tags: tiff.Directory) -> int | None:
    """Return what the fourth channel is, ASSOCIATED or UNASSOCIATED; None if it is not alpha. OpenCV does not say."""
    kind = tags.value(tiff.EXTRA, tiff.UNASSOCIATED)
    is_alpha = tags.value(tiff.SAMPLES) == 4 and tags.value(tiff.PHOTOMETRIC) == tiff.RGB
    return kind if is_alpha and kind in (tiff.ASSOCIATED, tiff.UNASSOCIATED) else None


def _exif(file: BinaryIO, tags: tiff.Directory) -> Image.Exif:
    file.seek(0)
    if tags.big:
        return Image.open(file).getexif()
    exif = Image.Exif()
    exif.load_from_fp(file)
    return exif
