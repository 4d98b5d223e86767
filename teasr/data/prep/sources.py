"""Find and inspect the photographs of a shard set; each is kept, or skipped for a stated reason.

Inspection decodes each photograph completely, so that broken files are found before any shard is made. It works in
chunks, whose results are stored in files below `<out>/.plan`: an interrupted inspection resumes, and machines that
share the folder each inspect the chunks that are still missing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from teasr.data.layout import FORMAT
from teasr.data.prep import lossless
from teasr.imaging import finding, images
from teasr.util.files import write_atomic

CHUNK = 64  # photographs per chunk
TILE_PX = 64


@dataclass(frozen=True)
class Photo:
    """A usable photograph: name relative to the folder, hash of the file, size in upright orientation.

    The other fields are used later to select it and to place its crops.
    """

    name: str
    sha256: str
    pixels: str  # hash of the decoded image, to find the same image in another file
    width: int
    height: int
    sharpness: float  # standard deviation of the Laplacian in a tile, in grey levels: 0.9 quantile over the tiles
    contrast: float  # standard deviation of the luma, in grey levels
    mcu_px: int  # grid on which a JPEG can be cropped losslessly; 0 if it cannot
    lq: str = ""  # in a paired set: name of the LQ image relative to the LQ folder
    lq_sha256: str = ""
    caption: str = ""  # set when the photograph is used (caption_files.py)


@dataclass(frozen=True)
class Chunk:
    """Photographs to inspect, as (name, bytes, modification time in ns), and the file for the result.

    In a paired set each photograph is followed by its LQ image, which must be `scale` times smaller. `jpeg`: JPEG
    photographs will be cropped losslessly.
    """

    folder: str
    files: tuple[tuple[str, int, int], ...]
    result: str
    lq_folder: str = ""
    scale: int = 4
    jpeg: bool = False

    @property
    def photos(self) -> int:
        """Number of photographs."""
        return len(self.files) // (2 if self.lq_folder else 1)

    @property
    def identity(self) -> str:
        """Hash that changes when one of the files changes."""
        parts = [FORMAT, self.files, bool(self.lq_folder), self.scale, *([self.jpeg] if self.jpeg else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find(
    folder: Path, out: Path, lq_folder: Path | None = None, scale: int = 4, jpeg: bool = False
) -> tuple[list[Chunk], list[tuple[str, str]]]:
    """Find all images below a folder, in chunks to inspect, and (name, reason) of those that cannot be inspected.

    Raises ValueError when there are no images.
    """
    names, problems = _walk(folder)
    if out.resolve().is_relative_to(folder.resolve()):  # the files of the shard set are not photographs
        inside = out.resolve().relative_to(folder.resolve()).as_posix() + "/"
        names = [name for name in names if not name.startswith(inside)]
    pairs = dict.fromkeys(names, "")
    if lq_folder is not None:
        found, more = _walk(lq_folder)
        of_stem = {str(Path(name).with_suffix("")): name for name in found}
        pairs = {name: of_stem.pop(str(Path(name).with_suffix("")), "") for name in names}
        problems += [
            (f"{lq_folder.name}/{name}", "unpaired: there is no HQ image of this name") for name in of_stem.values()
        ]
        problems += more + [
            (name, f"unpaired: {lq_folder} contains no image of this name") for name in names if not pairs[name]
        ]
        pairs = {name: lq for name, lq in pairs.items() if lq}
    rows: list[tuple[tuple[str, int, int], ...]] = []
    for name, lq in pairs.items():
        both = [(name, *_stamp(folder / name))]
        rows.append((*both, (lq, *_stamp(lq_folder / lq))) if lq and lq_folder else tuple(both))
    chunks = [
        Chunk(
            str(folder), tuple(file for row in rows[i : i + CHUNK] for file in row),
            str(out / ".plan" / f"photos-{i // CHUNK:06d}.json"), str(lq_folder or ""), scale, jpeg,
        )
        for i in range(0, len(rows), CHUNK)
    ]  # fmt: skip
    return chunks, problems


def _walk(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of images")
    names, problems = finding.walk_pictures(folder)
    if not names:
        more = f" ({problems[0][0]}: {problems[0][1]})" if problems else ""
        raise ValueError(
            f"{folder} contains no images ({', '.join(images.SUFFIXES)}); add some or choose another folder{more}"
        )
    return names, problems


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0)  # a dangling link: reported when it is inspected
    return (stat.st_size, stat.st_mtime_ns)


def inspect_chunk(chunk: Chunk, on_photo: Callable[[int], None] = lambda photos: None) -> list[Photo | tuple[str, str]]:
    """Inspect every photograph of a chunk, or read the stored result: photos, and (name, reason) of unusable ones.

    `on_photo(n)` is called each time n more photographs are inspected.
    """
    known = _read_result(chunk)
    if known is not None:
        on_photo(len(known))
        return known
    rows: list[Photo | tuple[str, str]] = []
    names = [name for name, _, _ in chunk.files]
    paired = bool(chunk.lq_folder)
    for name, lq in zip(names[::2], names[1::2], strict=True) if paired else ((name, "") for name in names):
        try:
            photo = inspect_photo(Path(chunk.folder) / name, name)
            if chunk.jpeg and photo.mcu_px and not lossless.can_read(Path(chunk.folder) / name):
                raise ValueError("broken: its JPEG data is damaged")
            rows.append(_with_lq(photo, Path(chunk.lq_folder) / lq, lq, chunk.scale) if paired else photo)
        except ValueError as error:
            rows.append((name, str(error)))
        on_photo(1)
    result = {"identity": chunk.identity, "rows": [asdict(r) if isinstance(r, Photo) else list(r) for r in rows]}
    write_atomic(Path(chunk.result), json.dumps(result).encode())
    return rows


def _read_result(chunk: Chunk) -> list[Photo | tuple[str, str]] | None:
    try:
        result = json.loads(Path(chunk.result).read_text())
        if result["identity"] == chunk.identity:
            return [Photo(**row) if isinstance(row, dict) else tuple(row) for row in result["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or from another version: inspect again
    return None


def inspect_photo(path: Path, name: str) -> Photo:
    """Decode and measure one photograph.

    Raises ValueError when it cannot be used; the message begins with the kind of problem.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"file cannot be read: {error.strerror}") from error
    try:
        x = images.read_rgb(data, name)
        if images.has_transparency(data):
            raise ValueError("transparent: some pixels are not opaque")
        grid = lossless_grid(data)
    except images.DAMAGED as error:
        if str(error).startswith("transparent"):
            raise
        raise ValueError(f"broken: {str(error).removeprefix(f'{name} ')}") from error
    sharpness, contrast = measure(x)
    return Photo(
        name=name,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=hashlib.sha256(x.tobytes() + repr(x.shape).encode()).hexdigest(),
        width=x.shape[1],
        height=x.shape[0],
        sharpness=round(sharpness, 2),
        contrast=round(contrast, 2),
        mcu_px=grid,
    )


def _with_lq(photo: Photo, path: Path, name: str, scale: int) -> Photo:
    lq = inspect_photo(path, name)
    if (lq.width * scale, lq.height * scale) != (photo.width, photo.height):
        raise ValueError(
            f"sizes do not match: HQ {photo.width}x{photo.height} px must be {scale} times LQ {lq.width}x{lq.height} px"
        )
    return replace(photo, lq=name, lq_sha256=lq.sha256)


def measure(x: np.ndarray) -> tuple[float, float]:
    """(sharpness, contrast) of an image [H, W, 3], as defined in `Photo`."""
    luma, edges = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), _laplacian(x)
    tile = min(TILE_PX, *luma.shape)
    rows, columns = luma.shape[0] // tile, luma.shape[1] // tile
    tiles = edges[: rows * tile, : columns * tile].reshape(rows, tile, columns, tile)
    return float(np.quantile(tiles.std((1, 3)), 0.9)), float(luma.std())


def detail(x: np.ndarray) -> float:
    """Standard deviation of the Laplacian of an image [H, W, 3], in grey levels: how much fine detail it has."""
    return float(_laplacian(x).std())


def _laplacian(x: np.ndarray) -> np.ndarray:
    return cv2.Laplacian(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.CV_16S, ksize=1).astype(np.float32)


def lossless_grid(data: bytes) -> int:
    """Size in px of the grid on which a JPEG file can be cropped without decoding: 8 or 16; 0 for all other files.

    Also 0 when the pixels would have to change: EXIF rotation, a colour profile, grey or CMYK.
    """
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as picture:
        if picture.format != "JPEG" or picture.mode != "RGB" or picture.info.get("icc_profile"):
            return 0
        if picture.getexif().get(images.ORIENTATION, 1) != 1 or "adobe_transform" in picture.info:
            return 0
        factors = {layer[1:3] for layer in picture.layer}
    return {(1, 1): 8, (2, 2): 16, (2, 1): 16, (1, 2): 16}.get(max(factors), 0) if (1, 1) in factors else 0
