"""Picture files with their metadata.

Bit depth, alpha, greyscale, orientation, colour profile and EXIF are kept when a picture is restored.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from teasr.imaging import images
from teasr.util.files import write_atomic

FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tif": ".tif"}
NAMES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "TIFF": "tif", "BMP": "png"}  # by Pillow's name
QUALITY = 95  # of JPEG and WebP
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
    format: str = "png"  # a key of FORMATS: the format of the source file

    def restored(self, rgb: np.ndarray) -> Picture:
        """Return the picture with other RGB values, of any size; alpha is resized to match by bicubic interpolation."""
        alpha = self.alpha
        if alpha is not None:
            alpha = cv2.resize(alpha, (rgb.shape[1], rgb.shape[0]), interpolation=cv2.INTER_CUBIC)
        return replace(self, rgb=rgb, alpha=alpha)


def stored_suffix(path: Path) -> str:
    """Return the suffix for the result: that of the source file, or .png for formats that cannot be written."""
    return path.suffix if path.suffix.lower() in (*FORMATS.values(), ".jpeg", ".tiff") else ".png"


def read(path: Path) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF or BMP.

    Raises ValueError, naming the file, if it is missing, broken, animated, or has more than `images.MAX_PIXELS` pixels.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    try:
        return _read_deep(data) or _read_eight(data)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image in a supported format (PNG, JPEG, WebP, TIFF, BMP)") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _read_eight(data: bytes) -> Picture:
    with Image.open(io.BytesIO(data)) as opened:
        frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"it is animated or has several pages: {frames} frames")
        if opened.format not in NAMES:
            raise ValueError(f"format {opened.format} is not supported; use PNG, JPEG, WebP, TIFF or BMP")
        return replace(from_pil(opened), format=NAMES[opened.format])


def _read_deep(data: bytes) -> Picture | None:
    """Read a PNG or TIFF with 16 bits per channel; return None for others."""
    png, tif = data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10", data[:4] in (b"II*\0", b"MM\0*")
    if not png and not tif:
        return None
    info: dict = {}
    try:
        with Image.open(io.BytesIO(data)) as opened:  # this reads the header only, no pixels
            info, frames = dict(opened.info), getattr(opened, "n_frames", 1)
            info["exif_object"] = opened.getexif()
            if frames > 1:
                raise ValueError(f"it is animated or has several pages: {frames} frames")
            if opened.size[0] * opened.size[1] > images.MAX_PIXELS:
                raise Image.DecompressionBombError(
                    f"{opened.size[0]}x{opened.size[1]} px exceeds the limit of {images.MAX_PIXELS} px"
                )
    except UnidentifiedImageError:
        if not tif:
            raise
    x = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if x is None:
        if tif and info:
            return None  # a variant that Pillow reads
        raise ValueError("truncated or damaged data")
    if x.dtype != np.uint16:
        return None
    x = x[..., None] if x.ndim == 2 else x
    exif = info.get("exif_object") or Image.Exif()
    x = _upright(x, exif.get(images.ORIENTATION, 1))
    grey, alpha = x.shape[2] == 1, x[..., 3].copy() if x.shape[2] == 4 else None
    rgb = np.repeat(x, 3, 2) if grey else np.ascontiguousarray(x[..., 2::-1])
    return Picture(rgb, alpha, grey, info.get("icc_profile"), _kept(exif), "png" if png else "tif")


def _kept(exif: Image.Exif) -> bytes | None:
    for tag in [tag for tag in exif if tag not in KEPT_TAGS]:
        del exif[tag]
    return exif.tobytes() if len(exif) else None


def _upright(x: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation: values 2 to 8 are flips and rotations by multiples of 90 degrees."""
    if orientation in (5, 6, 7, 8):
        x = x.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        x = x[:, ::-1]
    if orientation in (3, 4, 7, 8):
        x = x[::-1]
    return np.ascontiguousarray(x)


def from_pil(opened: Image.Image) -> Picture:
    """Convert a Pillow image, rotated as its EXIF says. Raises ValueError for modes that cannot be restored."""
    exif, profile = opened.getexif(), opened.info.get("icc_profile")
    upright = ImageOps.exif_transpose(opened)
    if upright.mode in ("I;16", "I;16L", "I;16B"):
        deep = np.asarray(upright).astype(np.uint16)
        return Picture(np.repeat(deep[..., None], 3, 2), None, True, profile, _kept(exif))
    if upright.mode == "F" or upright.mode.startswith("I"):
        raise ValueError(f"its pixel mode {upright.mode} is not supported; convert it to RGB")
    if upright.mode == "CMYK":
        upright, profile = images.to_srgb(upright), None
    transparent = "transparency" in upright.info or upright.mode in ("LA", "PA", "RGBA", "La", "RGBa")
    grey = upright.mode in ("1", "L", "LA", "La")
    rgba = np.asarray(upright.convert("RGBA")) if transparent else None
    rgb = np.ascontiguousarray(rgba[..., :3]) if transparent else np.asarray(upright.convert("RGB"))
    alpha = np.ascontiguousarray(rgba[..., 3]) if transparent else None
    return Picture(rgb, alpha, grey, profile, _kept(exif))


def to_pil(picture: Picture) -> Image.Image:
    """Convert to a Pillow image of mode L, LA, RGB, RGBA or I;16.

    Raises ValueError for 16-bit colour, which Pillow does not support.
    """
    x = _channels(picture)
    if x.dtype == np.uint16 and x.shape[2] > 1:
        raise ValueError("Pillow does not support colour images of 16 bits per channel; pass numpy arrays")
    image = Image.fromarray(x[..., 0] if x.shape[2] == 1 else x)
    if picture.profile:
        image.info["icc_profile"] = picture.profile
    return image


def write(path: Path, picture: Picture) -> None:
    """Write the picture atomically, in the format given by the suffix of `path`.

    Raises ValueError if the format cannot hold the picture, and OSError like `write_atomic`.
    """
    kind = next((name for name, suffix in FORMATS.items() if path.suffix.lower() == suffix), None)
    kind = {".jpeg": "jpg", ".tiff": "tif"}.get(path.suffix.lower(), kind)
    if kind is None:
        raise ValueError(f"{path}: unknown suffix; images are written as {', '.join(FORMATS.values())}")
    if kind == "jpg" and picture.alpha is not None:
        raise ValueError(f"{path}: JPEG cannot store transparency; choose png or webp")
    if picture.rgb.dtype == np.uint16 and kind in ("jpg", "webp"):
        raise ValueError(f"{path}: {kind} stores 8 bits per channel, but the image has 16; choose png or tif")
    write_atomic(path, _deep(picture, kind) if picture.rgb.dtype == np.uint16 else _eight(picture, kind))


def _channels(picture: Picture) -> np.ndarray:
    """Return [H, W, C] with the channels to write: grey, grey and alpha, RGB, or RGBA."""
    x = picture.rgb
    if picture.grey:
        x = np.rint(x.mean(2, keepdims=True)).astype(x.dtype)
    return x if picture.alpha is None else np.concatenate((x, picture.alpha[..., None]), 2)


def _eight(picture: Picture, kind: str) -> memoryview:
    name, extra = {
        "png": ("PNG", {}),
        "jpg": ("JPEG", {"quality": QUALITY, "subsampling": 0}),
        "webp": ("WEBP", {"quality": QUALITY}),
        "tif": ("TIFF", {"compression": "tiff_lzw"}),
    }[kind]
    metadata = {key: value for key, value in (("icc_profile", picture.profile), ("exif", picture.exif)) if value}
    out = io.BytesIO()
    to_pil(picture).save(out, name, **extra, **metadata)
    return out.getbuffer()


def _deep(picture: Picture, kind: str) -> bytes:
    """Encode 16 bits per channel with OpenCV.

    OpenCV does not support grey with alpha, which is written as RGBA, or metadata, which is added here for PNG only.
    """
    x = _channels(picture if picture.alpha is None else replace(picture, grey=False))
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[x.shape[2]]
    good, data = cv2.imencode(FORMATS[kind], np.ascontiguousarray(x[..., order]))
    if not good:
        raise OSError(f"OpenCV cannot write {kind}")
    data = data.tobytes()
    if kind == "png":
        chunks = []
        if picture.profile:
            chunks.append((b"iCCP", b"ICC\0\0" + zlib.compress(picture.profile)))
        if picture.exif:
            chunks.append((b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
        head = 33  # signature and IHDR
        encoded = b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )
        data = data[:head] + encoded + data[head:]
    return data
