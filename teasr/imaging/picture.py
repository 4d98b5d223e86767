"""Picture files with their metadata.

Bit depth, alpha, greyscale, orientation, colour profile and EXIF are kept when a picture is restored. CIELAB and CMYK
become sRGB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from teasr.imaging import bands, deep, formats, images, spaces
from teasr.imaging.deep import Decoded
from teasr.imaging.encoders import ENCODERS, QUALITY, Pixels
from teasr.imaging.formats import Layout
from teasr.util.files import atomic_file
from teasr.util.scratch import MEMORY, Scratch

READABLE = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP")  # Pillow's names
SIXTEEN = ("I;16", "I;16L", "I;16B")  # Pillow's modes of grey with 16 bits
TRANSPARENT = ("LA", "PA", "RGBA", "La", "RGBa")
# EXIF tags that also hold for the restored picture: description, make, model, resolution, software, date, artist,
# copyright, and the directories of camera and GPS data. Orientation is left out, since the picture is stored upright,
# and so are the tags that say how a TIFF was stored.
KEPT_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, 0x8769, 0x8825}


@dataclass(frozen=True)
class Picture:
    """A picture in memory: RGB [H, W, 3] in uint8 or uint16, upright, and `alpha` [H, W] of the same dtype.

    grey: the picture is written with one colour channel.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    grey: bool = False
    profile: bytes | None = None  # ICC; the values are not converted, and the profile is written with the result
    exif: bytes | None = None

    @property
    def layout(self) -> Layout:
        """What a file format must be able to hold."""
        height, width = self.rgb.shape[:2]
        return Layout(width, height, self.alpha is not None, self.rgb.dtype == np.uint16)

    def restored(self, rgb: np.ndarray, scratch: Scratch = MEMORY) -> Picture:
        """Return the picture with other RGB values, of any size; alpha is resized to match by bicubic interpolation."""
        alpha = self.alpha
        if alpha is not None:
            alpha = bands.resize_alpha(alpha, *rgb.shape[:2], scratch)
        return replace(self, rgb=rgb, alpha=alpha)

    def channels(self, top: int = 0, bottom: int | None = None) -> np.ndarray:
        """Return rows as [n, W, C] with the channels to write: grey, grey and alpha, RGB, or RGBA."""
        x = self.rgb[top:bottom]
        if self.grey:
            x = np.rint(x.mean(2, keepdims=True)).astype(x.dtype)
        return x if self.alpha is None else np.concatenate((x, self.alpha[top:bottom, :, None]), 2)


def read(path: Path) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF or BMP.

    Raises ValueError, naming the file, if it is missing, broken, animated, or has more than `images.MAX_PIXELS` pixels.
    """
    with _explained(path), open(path, "rb") as file:
        if tags := deep.tiff_tags(file):
            return _upright(deep.read_tiff(file, tags))
        opened = _opened(file)
        if deep.png_depth(file) == 16:
            return _upright(deep.read_png(file, opened))
        return _from_pil(opened, owned=True)


def layout(path: Path) -> Layout:
    """Return the layout that `read` would give the picture, from the file's header. Raises ValueError like `read`."""
    with _explained(path), open(path, "rb") as file:
        if tags := deep.tiff_tags(file):
            return deep.tiff_layout(tags)
        opened = _opened(file)
        turned = opened.format != "PNG" and opened.getexif().get(images.ORIENTATION, 1) >= 5
        alpha = opened.mode in TRANSPARENT or "transparency" in opened.info
        sixteen = deep.png_depth(file) == 16 or opened.mode in SIXTEEN
        return Layout(*(opened.size[::-1] if turned else opened.size), alpha, sixteen)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of opening and decoding a file into ValueErrors that name it."""
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image in a supported format (PNG, JPEG, WebP, TIFF, BMP)") from None
    except images.DAMAGED as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from None
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _opened(file: BinaryIO) -> Image.Image:
    """Open a picture with Pillow, which reads the header only."""
    file.seek(0)
    opened = Image.open(file)
    frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"it is animated or has several pages: {frames} frames")
    if opened.format not in READABLE:
        raise ValueError(f"format {opened.format} is not supported; use PNG, JPEG, WebP, TIFF or BMP")
    deep.check_size(*opened.size)
    return opened


def _upright(decoded: Decoded) -> Picture:
    """Turn the picture as its EXIF says: orientations 2 to 8 are flips and rotations by multiples of 90 degrees."""
    orientation = decoded.exif.get(images.ORIENTATION, 1)

    def turned(x: np.ndarray) -> np.ndarray:
        x = x.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else x
        x = x[:, ::-1] if orientation in (2, 3, 6, 7) else x
        return np.ascontiguousarray(x[::-1] if orientation in (3, 4, 7, 8) else x)

    profile, grey = spaces.fitting(decoded.profile, decoded.grey)
    alpha = None if decoded.alpha is None else turned(decoded.alpha)
    return Picture(turned(decoded.rgb), alpha, grey, profile, _kept(decoded.exif))


def _kept(exif: Image.Exif) -> bytes | None:
    for tag in [tag for tag in exif if tag not in KEPT_TAGS]:
        del exif[tag]
    exif.bigtiff = False  # of the file that it comes from
    return exif.tobytes() if len(exif) else None


def from_pil(opened: Image.Image) -> Picture:
    """Convert a Pillow image, rotated as its EXIF says. Raises ValueError for modes that cannot be restored."""
    return _from_pil(opened, owned=False)


def _from_pil(image: Image.Image, owned: bool) -> Picture:
    """owned: the image may be changed, which saves memory."""
    exif, profile = image.getexif(), image.info.get("icc_profile")
    image = (ImageOps.exif_transpose(image, in_place=True) or image) if owned else ImageOps.exif_transpose(image)
    mode = image.mode
    if mode in SIXTEEN:
        sixteen = np.asarray(image).astype(np.uint16)
        profile, grey = spaces.fitting(profile, True)
        return Picture(np.repeat(sixteen[..., None], 3, 2), None, grey, profile, _kept(exif))
    if mode == "F" or mode.startswith("I"):
        raise ValueError(f"its pixel mode {mode} is not supported; convert it to RGB")
    if mode == "CMYK":
        image, profile = images.to_srgb(image), None
    profile, grey = spaces.fitting(profile, mode in ("1", "L", "LA", "La"))
    transparent = "transparency" in image.info or mode in TRANSPARENT
    pixels = _pixels(image, "RGBA" if transparent else "RGB")
    alpha = np.ascontiguousarray(pixels[..., 3]) if transparent else None
    return Picture(np.ascontiguousarray(pixels[..., :3]), alpha, grey, profile, _kept(exif))


def _pixels(image: Image.Image, mode: str) -> np.ndarray:
    image = image if image.mode == mode else image.convert(mode)
    out = np.empty((image.height, image.width, len(mode)), np.uint8)
    for top, bottom in bands.spans(image.height, out[0].size):
        out[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return out


def to_pil(picture: Picture) -> Image.Image:
    """Convert to a Pillow image of mode L, LA, RGB, RGBA or I;16.

    Raises ValueError for 16-bit colour, which Pillow does not support.
    """
    x = picture.channels()
    if x.dtype == np.uint16 and x.shape[2] > 1:
        raise ValueError("Pillow does not support colour images of 16 bits per channel; pass numpy arrays")
    image = Image.fromarray(x[..., 0] if x.shape[2] == 1 else x)
    if picture.profile:
        image.info["icc_profile"] = picture.profile
    return image


def write(
    path: Path,
    picture: Picture,
    on_rows: Callable[[int, int], None] = lambda done, of: None,
    overwrite: bool = True,
    quality: int = QUALITY,
) -> None:
    """Write the picture atomically, in the format given by the suffix of `path`.

    on_rows(done, all): called with the number of rows written. quality: of JPEG and WebP, 1 to 100. Raises ValueError
    if the format cannot hold the picture, FileExistsError if the file exists and must not be overwritten, OSError that
    names the path if it cannot be written.
    """
    formats.check(path, picture.layout)
    kind, (height, width) = formats.kind_of(path), picture.rgb.shape[:2]
    if kind == "tif" and picture.layout.alpha and picture.layout.deep:
        picture = replace(picture, grey=False)  # few programs read a TIFF of grey and alpha with 16 bits

    def strips(rows: int) -> Iterator[np.ndarray]:
        for top in range(0, height, rows):
            yield np.ascontiguousarray(picture.channels(top, top + rows))
            on_rows(min(height, top + rows), height)

    metadata = {key: value for key, value in (("icc_profile", picture.profile), ("exif", picture.exif)) if value}
    pixels = Pixels(width, height, picture.channels(0, 1).shape[2], picture.layout.deep, strips, metadata, quality)
    try:
        with atomic_file(path, overwrite) as file:
            ENCODERS[kind](file, pixels)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
