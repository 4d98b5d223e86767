"""Read pictures to uint8 RGB, encode them, convert them to tensors in [-1, 1] and back, and upsample LQ bicubically.

torch is imported only inside the functions that create tensors, since the data preparation processes do not need it.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageOps, UnidentifiedImageError

from teasr.imaging import tiff

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
MAX_PIXELS = 178_956_970  # Pillow's limit, since a file of a few kilobytes may decompress to far more
ORIENTATION = 0x0112
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")  # Pillow's names; other decoders of it are not needed
# What Pillow and OpenCV raise for damaged files.
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    struct.error, zlib.error, cv2.error, Image.DecompressionBombError,
)  # fmt: skip
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this number and refuses above twice as many
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_rgb(source: Path | bytes, name: str | None = None) -> np.ndarray:
    """Read a picture file or its bytes as [H, W, 3] uint8 in sRGB, rotated as its EXIF says, without alpha.

    Grey, palette, CMYK and 16-bit pictures are converted. Raises ValueError, naming the picture, if it is missing,
    broken, animated, has several pages or has more than `MAX_PIXELS` pixels.
    """
    name = name or ("the image" if isinstance(source, bytes) else str(source))
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror})") from error
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # MPO: a photo and its depth map
            if frames > 1:
                raise ValueError(f"it is animated or has several pages: {frames} frames")
            if _is_plain(picture, data):
                return _decode(data, name)
            return np.asarray(to_srgb(ImageOps.exif_transpose(picture)))
    except UnidentifiedImageError as error:
        try:
            deep = _read_deep_tiff(data)  # three channels of 16 bit, of kinds that Pillow does not support
        except DAMAGED:
            deep = None
        if deep is not None:
            return deep
        raise _broken(name, error) from error
    except DAMAGED as error:
        raise _broken(name, error) from error


def _is_plain(picture: Image.Image, data: bytes) -> bool:
    """Whether OpenCV, which is up to twice as fast as Pillow, would decode to the same pixels."""
    if picture.mode != "RGB" or picture.format not in ("JPEG", "PNG") or picture.info.get("icc_profile"):
        return False
    if "transparency" in picture.info or "adobe_transform" in picture.info:
        return False
    if picture.format == "PNG":  # getexif would decode the whole picture
        return b"eXIf" not in data and b"Raw profile" not in data
    return picture.getexif().get(ORIENTATION, 1) == 1


def _broken(name: str, error: Exception) -> ValueError:
    text = "unknown image format" if isinstance(error, UnidentifiedImageError) else str(error)
    text = text.removeprefix(f"{name} ").removeprefix("cannot be read as an image: ")
    return ValueError(f"{name} cannot be read as an image ({text}); remove it or save it again")


def to_srgb(picture: Image.Image) -> Image.Image:
    """Convert any mode to RGB, applying an embedded colour profile other than sRGB. Raises ValueError for mode F."""
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        sixteen = np.asarray(picture).astype(np.float32)
        return Image.fromarray((sixteen / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    profile = picture.info.get("icc_profile")
    if profile and picture.mode in ("RGB", "CMYK"):
        try:
            embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(embedded):
                return ImageCms.profileToProfile(picture, embedded, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # ignore a damaged profile and treat the values as sRGB
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _read_deep_tiff(data: bytes) -> np.ndarray | None:
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    tags = tiff.Directory(io.BytesIO(data))
    if tags.value(tiff.WIDTH) * tags.value(tiff.HEIGHT) > MAX_PIXELS:
        return None
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH)
    if picture is None or picture.dtype != np.uint16:
        return None
    return (picture / np.float32(257)).round().astype(np.uint8)


def has_transparency(data: bytes) -> bool:
    """Whether any pixel of a picture file that `read_rgb` reads is not fully opaque."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        if picture.mode in ("RGBA", "LA", "PA"):
            return picture.getchannel("A").getextrema()[0] < 255
        return "transparency" in picture.info and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255


def decode_rgb(data: bytes, name: str) -> np.ndarray:
    """Decode a PNG, WebP or JPEG written by this package to [H, W, 3] uint8 RGB, faster than `read_rgb`.

    Raises ValueError, with `name`, if the data cannot be decoded or is not such a picture: grey, with an alpha channel,
    16 bit, animated, or of more than `MAX_PIXELS` pixels.
    """
    other = _not_ours(data)
    if other:
        raise ValueError(f"{name} cannot be read as an image: {other}, but an 8-bit RGB PNG, WebP or JPEG is expected")
    return _decode(data, name)


def _decode(data: bytes, name: str) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        x = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:  # a size that OpenCV refuses
        x = None
    if x is None:
        raise ValueError(f"{name} cannot be read as an image: truncated or damaged data")
    return x


def _not_ours(data: bytes) -> str:
    """How the head of a picture differs from what this package writes; empty if it does not."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 33:  # read by hand: Pillow takes longer than the decoding
        width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
        head = data[33 : max(33, data.find(b"IDAT"))]
        mode = {0: "grey", 2: "RGB", 3: "a palette", 4: "grey with alpha", 6: "RGB with alpha"}.get(colour, "unknown")
        found, frames = f"{depth}-bit {mode}", 2 if b"acTL" in head else 1
        mode = mode if depth == 8 and b"tRNS" not in head else ""
    else:
        try:
            with Image.open(io.BytesIO(data), formats=("WEBP", "JPEG")) as picture:
                (width, height), mode, frames = picture.size, picture.mode, getattr(picture, "n_frames", 1)
        except DAMAGED:
            return "damaged or of another format"
        found = f"mode {mode}"
    if width * height > MAX_PIXELS:
        return f"{width}x{height} px"
    return "" if mode == "RGB" and frames == 1 else "animated" if frames > 1 else found


def png_bytes(x: np.ndarray) -> bytes:
    """[H, W, 3] uint8 -> PNG."""
    return _encode(".png", x, [])


def webp_bytes(x: np.ndarray) -> bytes:
    """[H, W, 3] uint8 -> lossless WebP, at the fastest setting."""
    buffer = io.BytesIO()
    Image.fromarray(x).save(buffer, "WEBP", lossless=True, method=0, quality=0, exact=True)
    return buffer.getvalue()


def jpeg_bytes(x: np.ndarray, quality: int) -> bytes:
    """[H, W, 3] uint8 -> JPEG with full chroma (4:4:4)."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])


def _encode(suffix: str, x: np.ndarray, options: list[int]) -> bytes:
    ok, data = cv2.imencode(suffix, cv2.cvtColor(x, cv2.COLOR_RGB2BGR), options)
    assert ok, f"OpenCV failed to encode {suffix}"
    return data.tobytes()


def to_tensor(x: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(x: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] (clamped) -> [H, W, 3] uint8."""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def turn(x: np.ndarray, number: int) -> np.ndarray:
    """Flip and rotate an image [H, W, 3] by one of the eight symmetries of the square, 0 to 7; 0 changes nothing.

    Odd numbers flip it horizontally first; number // 2 counts the quarter turns, counter-clockwise.
    """
    return np.rot90(cv2.flip(x, 1) if number & 1 else x, number >> 1)


def upsample(lq: np.ndarray, scale: int) -> np.ndarray:
    """Upsample bicubically like Pillow (as in OSEDiff's test).

    [h, w, 3] uint8 or uint16 -> [h * scale, w * scale, 3] of the same dtype.
    """
    return resize(lq, lq.shape[0] * scale, lq.shape[1] * scale)


def resize(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize like `upsample`, to any size: [h, w, 3] uint8 or uint16 -> [height, width, 3] of the same dtype."""
    import torch

    if x.dtype == np.uint8:
        return _bicubic(planes(x), height, width).permute(1, 2, 0).contiguous().numpy()
    out = np.empty((height, width, 3), x.dtype)
    for c in range(3):  # one channel at a time to save memory: floats take four bytes
        plane = _bicubic(torch.from_numpy(x[..., c].astype(np.float32))[None], height, width)[0]
        out[..., c] = plane.round_().clamp_(0, np.iinfo(x.dtype).max).numpy()
    return out


def upsample_planes(lq: Tensor, scale: int) -> Tensor:
    """`upsample` for tensors [3, h, w] uint8 by torch's integer path.

    It is four times as fast and differs by one level in 1 of 10,000 values.
    """
    return _bicubic(lq, lq.shape[1] * scale, lq.shape[2] * scale)


def _bicubic(x: Tensor, height: int, width: int) -> Tensor:
    import torch

    return torch.nn.functional.interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0]


def planes(x: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] uint8."""
    import torch

    out = np.empty((3, *x.shape[:2]), np.uint8)
    cv2.split(np.ascontiguousarray(x), list(out))
    return torch.from_numpy(out)


def comparison(rows: list[list[np.ndarray]], titles: list[str]) -> np.ndarray:
    """Draw a grid of equal-sized pictures with a title above each column, enlarging small ones by an integer factor."""
    factor = max(1, 256 // rows[0][0].shape[1])
    rows = [[np.kron(x, np.ones((factor, factor, 1), np.uint8)) for x in row] for row in rows]
    h, w = rows[0][0].shape[:2]
    bar, gap = 22, 4
    sheet = Image.new("RGB", (len(titles) * (w + gap) - gap, bar + len(rows) * (h + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * (w + gap) + w // 2, bar // 2), title, fill="black", anchor="mm")
        for line, row in enumerate(rows):
            sheet.paste(Image.fromarray(row[column]), (column * (w + gap), bar + line * (h + gap)))
    return np.asarray(sheet)
