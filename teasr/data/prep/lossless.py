"""Cut a rectangle out of a JPEG without decoding it: the coefficients stay, so nothing is lost a second time.

Uses jpeglib (an extra: it brings the libjpeg-turbo that lets one read coefficients).
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path


def check() -> None:
    """ValueError with the cure when jpeglib is not installed."""
    try:
        import jpeglib  # noqa: F401
    except ImportError:
        raise ValueError(
            "keep_jpeg cuts JPEGs with jpeglib: pip install 'teasr[jpeg]', or set keep_jpeg=false"
        ) from None


def crop(path: Path, left: int, top: int, side: int) -> bytes:
    """A JPEG of the square at (left, top); all three must be multiples of the photo's `mcu_px`."""
    import jpeglib

    source = _coefficients(path)
    planes = []
    for plane in (source.Y, source.Cb, source.Cr):
        # 4:2:0 has half as many chroma blocks each way, 4:2:2 one way only.
        down, across = (round(source.Y.shape[i] / plane.shape[i]) for i in (0, 1))
        y, x = top // (8 * down), left // (8 * across)
        planes.append(plane[y : y + side // (8 * down), x : x + side // (8 * across)].copy())
    cut = jpeglib.from_dct(*planes, qt=source.qt, quant_tbl_no=source.quant_tbl_no)
    cut.height = cut.width = side
    with tempfile.TemporaryDirectory() as folder:
        cut.write_dct(f"{folder}/cut.jpg")
        return Path(f"{folder}/cut.jpg").read_bytes()


@functools.lru_cache(maxsize=4)
def _coefficients(path: Path):
    import jpeglib

    source = jpeglib.read_dct(str(path))
    source.load()
    return source
