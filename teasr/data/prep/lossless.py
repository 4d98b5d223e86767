"""Crop a JPEG losslessly: the DCT coefficients are copied instead of decoded and encoded again.

Needs jpeglib (an optional dependency), which includes a libjpeg-turbo that gives access to the coefficients.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from teasr.util.optional import needed_for


def check() -> None:
    """Raise MissingPackage, which says what to type, when jpeglib is not installed."""
    with needed_for("keep_jpeg=true"):
        import jpeglib  # noqa: F401


def can_read(path: Path) -> bool:
    """Whether jpeglib reads the head of this JPEG. It refuses damage that other decoders hide."""
    import jpeglib

    try:
        jpeglib.read_dct(str(path))
    except OSError:
        return False
    return True


def crop(path: Path, left: int, top: int, side: int) -> bytes:
    """Crop the square at (left, top) as JPEG bytes. All three numbers, in px, must be multiples of `Photo.mcu_px`.

    Raises ValueError that names the photograph if jpeglib fails.
    """
    try:
        return _crop(path, left, top, side)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be cropped without loss ({error}): it is damaged, or the folder for temporary files is "
            "full; remove or repair it, or set keep_jpeg=false"
        ) from None


def _crop(path: Path, left: int, top: int, side: int) -> bytes:
    import jpeglib

    source = _coefficients(path)
    planes = []
    for plane in (source.Y, source.Cb, source.Cr):
        # 4:2:0 has half as many chroma blocks in both directions, 4:2:2 in one direction only.
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
