"""Pictures in and out: files to uint8 RGB, uint8 to tensors in [-1, 1], and the bicubic up-sampling of LQ."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def read_rgb(source: Path | bytes, name: str | None = None) -> np.ndarray:
    """A picture file or its bytes -> [H, W, 3] uint8 RGB, turned upright by its EXIF. ValueError names a broken one."""
    name = name or str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture ({error}); remove it or save it again") from error


def find_pictures(folder: Path) -> list[Path]:
    """All picture files below a folder in sorted order, whatever the case of their suffix. ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that holds pictures")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); put some there or name another folder")
    return found


def png_bytes(x: np.ndarray) -> bytes:
    """[H, W, 3] uint8 -> PNG."""
    buffer = io.BytesIO()
    Image.fromarray(x).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def to_tensor(x: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(x: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] (clamped) -> [H, W, 3] uint8."""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def upsample(lq: np.ndarray, scale: int) -> np.ndarray:
    """Bicubic up-sampling (PIL, as OSEDiff tests with): [h, w, 3] uint8 -> [h * scale, w * scale, 3] uint8."""
    h, w = lq.shape[:2]
    return np.asarray(Image.fromarray(lq).resize((w * scale, h * scale), Image.Resampling.BICUBIC))


def comparison(rows: list[list[np.ndarray]], titles: list[str]) -> np.ndarray:
    """A grid of equal-sized pictures with a title above each column; small pictures are enlarged by whole factors."""
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
