"""Write pictures in strips of rows, so that one of any size needs little memory. Only WebP's encoder takes it whole.

An encoder takes a file opened for writing, the picture's width, height and number of channels (1 grey, 2 grey and
alpha, 3 RGB, 4 RGBA), `strips(n)`, which yields [n, W, C] arrays until the last row, and metadata: `icc_profile` and
`exif`, if any.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from teasr.imaging import spaces, tiff

QUALITY = 95  # default of JPEG and WebP
STRIP_BYTES = 2**20
MCU_PX = 8  # JPEG without subsampling is coded in blocks of this side


@dataclass(frozen=True)
class Pixels:
    """A picture as encoders take it."""

    width: int
    height: int
    channels: int
    deep: bool
    strips: Callable[[int], Iterator[np.ndarray]]
    metadata: dict[str, bytes]
    quality: int = QUALITY  # of JPEG and WebP, 1 to 100

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.channels * (1 + self.deep)


def png(file: BinaryIO, pixels: Pixels) -> None:
    """Write a PNG of 8 or 16 bits per channel."""

    def chunk(name: bytes, body: bytes) -> None:
        file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))

    colours = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.channels]
    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", pixels.width, pixels.height, 8 + 8 * pixels.deep, colours, 0, 0, 0))
    if "icc_profile" in pixels.metadata:
        chunk(b"iCCP", b"ICC\0\0" + zlib.compress(pixels.metadata["icc_profile"]))
    if "exif" in pixels.metadata:
        chunk(b"eXIf", pixels.metadata["exif"].removeprefix(b"Exif\0\0"))
    deflate, above = tiff.deflater(), np.zeros(pixels.row_bytes, np.uint8)
    for strip in pixels.strips(max(1, STRIP_BYTES // pixels.row_bytes)):
        raw = strip.astype(">u2" if pixels.deep else "u1").reshape(len(strip), -1).view(np.uint8)
        chunk(b"IDAT", deflate.compress(_filtered(raw, above, pixels.channels * (1 + pixels.deep))))
        above = raw[-1]
    chunk(b"IDAT", deflate.flush())
    chunk(b"IEND", b"")


def _filtered(raw: np.ndarray, above: np.ndarray, pixel_bytes: int) -> bytes:
    """Apply to each row [bytes] PNG's filter 1, 2, 3 or 4, whichever leaves the smallest numbers."""
    up = np.concatenate((above[None], raw[:-1]))
    left, corner = np.zeros_like(raw), np.zeros_like(raw)
    left[:, pixel_bytes:], corner[:, pixel_bytes:] = raw[:, :-pixel_bytes], up[:, :-pixel_bytes]
    a, b, c = (x.astype(np.int16) for x in (left, up, corner))
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest = np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))
    made = [raw - left, raw - up, raw - ((a + b) >> 1).astype(np.uint8), raw - nearest]
    costs = [np.abs(x.view(np.int8)).view(np.uint8).sum(1, dtype=np.int64) for x in made]
    best = np.argmin(costs, axis=0)
    out = np.empty((len(raw), raw.shape[1] + 1), np.uint8)
    out[:, 0] = best + 1
    for i, x in enumerate(made):
        out[best == i, 1:] = x[best == i]
    return out.tobytes()


def tif(file: BinaryIO, pixels: Pixels) -> None:
    """Write a TIFF of 8 or 16 bits per channel, compressed with deflate."""
    size = (pixels.width, pixels.height)
    tiff.write_strips(file, size, pixels.channels, pixels.deep, pixels.strips, pixels.metadata)


def jpg(file: BinaryIO, pixels: Pixels) -> None:
    """Write a JPEG with full chroma.

    Every strip is encoded alone, and their data follow one another between restart markers, at which a decoder starts
    afresh anyway.
    """
    across = -(-pixels.width // MCU_PX)
    blocks = max(1, min(65535 // across, STRIP_BYTES // (pixels.row_bytes * MCU_PX)))
    rows, last = blocks * MCU_PX, -(-pixels.height // (blocks * MCU_PX)) - 1
    for i, strip in enumerate(pixels.strips(rows)):
        out = io.BytesIO()
        options = {"quality": pixels.quality, "subsampling": 0, "restart_marker_rows": blocks}
        _image(strip).save(out, "JPEG", **options, **(pixels.metadata if i == 0 else {}))
        head, data = _split(out.getvalue())
        if i == 0:
            file.write(_with_height(head, pixels.height))
        file.write(data)
        file.write(b"\xff\xd9" if i == last else bytes((0xFF, 0xD0 + i % 8)))


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Return the header of a JPEG, up to its compressed data, and these without the end marker."""
    at = 2
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        at += 2 + length
        if marker == 0xDA:  # start of scan
            return data[:at], data[at:-2]


def _with_height(head: bytes, height: int) -> bytes:
    at = 2
    while head[at + 1] != 0xC0:  # start of a baseline frame
        at += 2 + int.from_bytes(head[at + 2 : at + 4])
    return head[: at + 5] + height.to_bytes(2) + head[at + 7 :]


def webp(file: BinaryIO, pixels: Pixels) -> None:
    """Write a WebP, which is always RGB: grey with a profile of its own is converted to sRGB.

    OpenCV makes the same bits as Pillow from an array of a third less bytes, but knows no metadata.
    """
    mode = "RGBA" if pixels.channels in (2, 4) else "RGB"
    whole = np.empty((pixels.height, pixels.width, len(mode)), np.uint8)
    metadata, top = dict(pixels.metadata), 0
    grey = metadata.pop("icc_profile", None) if pixels.channels < 3 else None
    for strip in pixels.strips(max(1, STRIP_BYTES // pixels.row_bytes)):
        part = spaces.grey_to_srgb(_image(strip), grey) if grey else _image(strip).convert(mode)
        order = cv2.COLOR_RGB2BGR if mode == "RGB" else cv2.COLOR_RGBA2BGRA
        whole[top : top + len(strip)] = cv2.cvtColor(np.asarray(part), order)
        top += len(strip)
    good, data = cv2.imencode(".webp", whole, [cv2.IMWRITE_WEBP_QUALITY, pixels.quality])
    if not good:
        raise OSError("OpenCV cannot encode it as WebP")
    file.write(_with_metadata(data.tobytes(), pixels, metadata))


def _with_metadata(data: bytes, pixels: Pixels, metadata: dict[str, bytes]) -> bytes:
    """Add profile and EXIF to a WebP, which then needs a header that announces them."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    image = data[30:] if data[12:16] == b"VP8X" else data[12:]
    profile, exif = metadata.get("icc_profile"), metadata.get("exif")
    flags = 32 * bool(profile) + 16 * image.startswith(b"ALPH") + 8 * bool(exif)
    if not profile and not exif:
        return data
    size = (pixels.width - 1).to_bytes(3, "little") + (pixels.height - 1).to_bytes(3, "little")
    parts = [b"WEBP", chunk(b"VP8X", struct.pack("<I", flags) + size), chunk(b"ICCP", profile) if profile else b""]
    parts += [image, chunk(b"EXIF", exif.removeprefix(b"Exif\0\0")) if exif else b""]
    return chunk(b"RIFF", b"".join(parts))


def _image(strip: np.ndarray) -> Image.Image:
    return Image.fromarray(strip[..., 0] if strip.shape[2] == 1 else strip)


ENCODERS = {"png": png, "jpg": jpg, "webp": webp, "tif": tif}
