"""TIFF: what Pillow and OpenCV cannot read, and writing in strips.

Both rest on a copy of a file's directory with some tags replaced, at the end of the same file: with other tags OpenCV
reads the samples of any colour space, and a directory that Pillow wrote for one pixel, with EXIF and profile, becomes
that of a whole picture.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES = 256, 257, 258, 259, 262, 273, 277
ROWS, COUNTS, PLANAR, PREDICTOR, TILE_OFFSETS, TILE_COUNTS, EXTRA, SIGN = 278, 279, 284, 317, 324, 325, 338, 339
PROFILE = 34675
LONG_TAGS = (WIDTH, HEIGHT, ROWS, OFFSETS, COUNTS, TILE_OFFSETS, TILE_COUNTS)  # the others hold 16-bit numbers
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR, CIELAB, ICCLAB = 0, 1, 2, 6, 8, 9  # values of PHOTOMETRIC
JPEG_INSIDE = (6, 7)  # values of COMPRESSION
ASSOCIATED, UNASSOCIATED = 1, 2  # values of EXTRA: colours multiplied by alpha, or not
MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # + is BigTIFF
NUMBERS = {1: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}  # types of tags, by their number
STRIP_BYTES = 2**20
CLASSIC_BYTES = 2**32 - 2**28  # larger pictures are written as BigTIFF


class Directory:
    """The first directory of a TIFF file: `tags[number]` is its packed entry."""

    def __init__(self, file: BinaryIO):
        """Raises OSError or struct.error if the file is damaged."""
        file.seek(0)
        head = file.read(16)
        if head[:4] not in MARKS:
            raise OSError("it is no TIFF file")
        self.order, self.big = "<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+")
        self.word, self.entry_bytes = ("Q", 20) if self.big else ("I", 12)
        file.seek(self._number(self.word, head[8:] if self.big else head[4:8]))
        count = self._number("Q" if self.big else "H", file.read(8 if self.big else 2))
        entries = [file.read(self.entry_bytes) for _ in range(min(count, 4096))]
        self.tags = {self._number("H", entry[:2]): entry for entry in entries}
        self.several_pages = any(file.read(8 if self.big else 4))
        self._file = file

    def _number(self, kind: str, data: bytes) -> int:
        return struct.unpack(self.order + kind, data)[0]

    def _numbers(self, kind: str, data: bytes) -> tuple[int, ...]:
        size = struct.calcsize(kind)
        return struct.unpack(f"{self.order}{len(data) // size}{kind}", data[: len(data) // size * size])

    def values(self, tag: int) -> tuple[int, ...]:
        """Return the numbers of a tag; none if it is missing or holds no numbers."""
        if tag not in self.tags:
            return ()
        entry, inline = self.tags[tag], 8 if self.big else 4
        kind = NUMBERS.get(self._number("H", entry[2:4]))
        if kind is None:
            return ()
        size = self._number(self.word, entry[4:-inline]) * struct.calcsize(kind)
        if size <= inline:
            return self._numbers(kind, entry[-inline:][:size])
        self._file.seek(self._number(self.word, entry[-inline:]))
        return self._numbers(kind, self._file.read(size))

    def raw(self, tag: int) -> bytes | None:
        """Return the bytes of a tag; None if it is missing."""
        return bytes(self.values(tag)) or None

    def value(self, tag: int, default: int = 0) -> int:
        """Return the first number of a tag."""
        return (*self.values(tag), default)[0]

    def packed(self, changes: dict[int, tuple[int, ...] | None], at: int) -> tuple[bytes, bytes]:
        """Return the start of the file, and this directory for position `at`; None in `changes` leaves a tag out."""
        kept = {tag: entry for tag, entry in self.tags.items() if tag not in changes}
        changes = {tag: numbers for tag, numbers in changes.items() if numbers is not None}
        count = struct.pack(self.order + ("Q" if self.big else "H"), len(kept) + len(changes))
        end = struct.pack(self.order + self.word, 0)  # no other page follows
        after = at + len(count) + (len(kept) + len(changes)) * self.entry_bytes + len(end)
        data = b""
        for tag, numbers in changes.items():
            kept[tag], more = self._entry(tag, numbers, after + len(data))
            data += more
        start = struct.pack(self.order + self.word, at)
        return start, count + b"".join(kept[tag] for tag in sorted(kept)) + end + data

    def _entry(self, tag: int, numbers: tuple[int, ...], at: int) -> tuple[bytes, bytes]:
        """Return the packed entry of a tag, and what of it has to be stored at position `at`."""
        kind = (16 if self.big else 4) if tag in LONG_TAGS else 3
        data = struct.pack(f"{self.order}{len(numbers)}{NUMBERS[kind]}", *numbers)
        inline = struct.calcsize(self.word)
        head = struct.pack(f"{self.order}HH{self.word}", tag, kind, len(numbers))
        if len(data) <= inline:
            return head + data.ljust(inline, b"\0"), b""
        return head + struct.pack(self.order + self.word, at), data


def beyond_pillow(tags: Directory) -> bool:
    """Whether Pillow cannot read this TIFF, or not fully, but `read_samples` can.

    These are CIELAB, YCbCr unless it is a JPEG inside, and grey and RGB of 16 bits per channel.
    """
    bits, space = set(tags.values(BITS)), tags.value(PHOTOMETRIC)
    if not set(tags.values(SIGN)) <= {1}:
        return False  # numbers with a sign, or floating-point numbers
    if space in (CIELAB, ICCLAB):
        return bits in ({8}, {16})
    if space == YCBCR:
        return bits == {8} and tags.value(COMPRESSION) not in JPEG_INSIDE
    return bits == {16} and space in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)


def read_samples(data: bytes, tags: Directory) -> np.ndarray:
    """Read the stored numbers as [H, W, C], whatever they mean; YCbCr is converted to RGB.

    Raises OSError for what cannot be read.
    """
    samples = tags.value(SAMPLES, 1)
    if tags.value(PHOTOMETRIC) == YCBCR:
        return _decode(data, tags, {})
    if tags.value(PLANAR, 1) == 1 or samples == 1:
        if samples not in (1, 3, 4):
            raise OSError(f"a TIFF of {samples} channels with 16 bits each; save it as RGBA or as PNG")
        return _decode(data, tags, {PHOTOMETRIC: (RGB if samples > 1 else BLACK_IS_ZERO,)})
    planes = []
    for i in range(samples):
        alone = {SAMPLES: (1,), BITS: tags.values(BITS)[:1], PLANAR: (1,), PHOTOMETRIC: (BLACK_IS_ZERO,), EXTRA: None}
        for tag in (OFFSETS, COUNTS, TILE_OFFSETS, TILE_COUNTS):
            numbers = tags.values(tag)
            if numbers:
                alone[tag] = numbers[i * len(numbers) // samples : (i + 1) * len(numbers) // samples]
        planes.append(_decode(data, tags, alone | ({SIGN: None} if SIGN in tags.tags else {})))
    return np.concatenate(planes, axis=2)


def _decode(data: bytes, tags: Directory, changes: dict) -> np.ndarray:
    if any(tags.values(tag) != numbers for tag, numbers in changes.items()):
        data = _with_tags(data, tags, changes)
    x = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if x is None or x.dtype not in (np.uint8, np.uint16):
        raise OSError("truncated or damaged data")
    if x.ndim == 2:
        return x[..., None]
    cv2.cvtColor(x, cv2.COLOR_BGR2RGB if x.shape[2] == 3 else cv2.COLOR_BGRA2RGBA, dst=x)
    return x


def _with_tags(data: bytes, tags: Directory, changes: dict) -> bytes:
    at = len(data) + len(data) % 2
    start, directory = tags.packed(changes, at)
    place = 8 if tags.big else 4
    return b"".join((data[:place], start, data[place + len(start) :], bytes(at - len(data)), directory))


def deflater() -> zlib._Compress:
    """Return a compressor for rows that were replaced by differences; three times as fast as zlib's default."""
    return zlib.compressobj(4, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_FILTERED)


def write_strips(
    file: BinaryIO,
    size: tuple[int, int],
    channels: int,
    deep: bool,
    strips: Callable[[int], Iterable[np.ndarray]],
    metadata: dict[str, bytes],
) -> None:
    """Write a picture of size (width, height) in grey, RGB or either with alpha. `strips(n)` yields its rows, n a time.

    metadata: `exif` and `icc_profile`, as Pillow takes them.
    """
    row_bytes = size[0] * channels * (1 + deep)
    rows, one = max(1, STRIP_BYTES // row_bytes), io.BytesIO()
    Image.new("L", (1, 1)).save(one, "TIFF", big_tiff=size[1] * row_bytes > CLASSIC_BYTES, **metadata)
    tags = Directory(one)
    file.write(one.getvalue())
    offsets, counts = [], []
    for strip in strips(rows):
        offsets.append(file.tell())
        file.write(_compressed(strip, "<u2" if deep else "u1"))
        counts.append(file.tell() - offsets[-1])
    at = file.tell() + file.tell() % 2
    layout = _layout_tags(size, channels, deep) | {ROWS: (rows,), OFFSETS: tuple(offsets), COUNTS: tuple(counts)}
    start, directory = tags.packed(layout, at)
    file.write(bytes(at - file.tell()) + directory)
    file.seek(8 if tags.big else 4)
    file.write(start)


def _compressed(strip: np.ndarray, kind: str) -> bytes:
    """Compress the differences of neighbours in rows [n, W, C]."""
    difference = strip.copy()
    difference[:, 1:] -= strip[:, :-1]
    deflate = deflater()
    return deflate.compress(difference.astype(kind).tobytes()) + deflate.flush()


def _layout_tags(size: tuple[int, int], channels: int, deep: bool) -> dict[int, tuple[int, ...] | None]:
    has_alpha = channels in (2, 4)
    return {
        WIDTH: size[:1],
        HEIGHT: size[1:],
        BITS: (8 + 8 * deep,) * channels,
        COMPRESSION: (8,),  # deflate
        PHOTOMETRIC: (RGB if channels > 2 else BLACK_IS_ZERO,),
        SAMPLES: (channels,),
        PLANAR: (1,),  # the channels of a pixel follow one another
        PREDICTOR: (2,),  # differences of neighbours
        EXTRA: (UNASSOCIATED,) if has_alpha else None,
    }
