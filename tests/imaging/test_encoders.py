"""encoders.py, formats.py: files written in strips hold what Pillow's do, and what a format cannot hold is known."""

import io

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms

from teasr.imaging import encoders, formats, picture, tiff
from teasr.imaging.formats import Layout
from teasr.imaging.picture import Picture

COFFEE = skimage.data.coffee()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif() -> bytes:
    """EXIF with tags in all three directories."""
    made = Image.Exif()
    made[0x010F], made[282] = "Camera", 300.0
    made.get_ifd(0x8769)[0x829A] = 0.5  # exposure time
    made.get_ifd(0x8825)[1] = "N"
    return made.tobytes()


def make(height: int, width: int, deep: bool, grey: bool, alpha: bool) -> Picture:
    """A picture with profile and EXIF."""
    rng, top = np.random.default_rng(0), 65535 if deep else 255
    dtype = np.uint16 if deep else np.uint8
    rgb = rng.integers(0, 65536, (height, width, 3)).astype(dtype) if deep else COFFEE[:height, :width].copy()
    rgb = np.repeat(rgb[..., :1], 3, 2) if grey else rgb
    opacity = np.tile(np.linspace(0, top, width).astype(dtype), (height, 1)) if alpha else None
    return Picture(rgb, opacity, grey, None if grey else SRGB, exif())


@pytest.mark.parametrize("strip_bytes", [5000, 2**20])
@pytest.mark.parametrize("size", [(61, 83), (8, 8), (1, 1), (300, 400)])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_strips_make_one_picture_with_its_metadata(tmp_path, monkeypatch, strip_bytes, size, deep, grey, alpha):
    monkeypatch.setattr(encoders, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(tiff, "STRIP_BYTES", strip_bytes)
    made = make(*size, deep, grey, alpha)
    for name, kind in formats.FORMATS.items():
        if (deep and not kind.deep) or (alpha and not kind.alpha):
            continue
        path = tmp_path / f"a{formats.suffix_of(name)}"
        picture.write(path, made)
        read = picture.read(path)
        assert picture.layout(path) == read.layout == made.layout and read.profile == made.profile
        again = Image.Exif()
        again.load(read.exif)
        assert (again[0x010F], again[282], again.get_ifd(0x8769)[0x829A], again.get_ifd(0x8825)[1]) == (
            "Camera", 300, 0.5, "N",
        )  # fmt: skip
        if name in ("png", "tif"):
            assert np.array_equal(read.rgb, made.rgb) and (made.alpha is None or np.array_equal(read.alpha, made.alpha))
        if not deep:
            assert np.array_equal(_decoded(path.read_bytes()), _decoded(_by_pillow(name, made)))


def _by_pillow(name: str, made: Picture) -> bytes:
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95}}.get(name, {})
    out = io.BytesIO()
    picture.to_pil(made).save(out, {"jpg": "JPEG", "tif": "TIFF"}.get(name, name.upper()), **options)
    return out.getvalue()


def _decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


@pytest.mark.parametrize("name", ["jpg", "png", "tif"])
def test_other_programs_read_the_strips_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(encoders, "STRIP_BYTES", 5000)
    monkeypatch.setattr(tiff, "STRIP_BYTES", 5000)
    made, path = make(300, 400, False, False, False), tmp_path / f"a{formats.suffix_of(name)}"
    picture.write(path, made)
    wanted = cv2.imdecode(np.frombuffer(_by_pillow(name, made), np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), wanted)


@pytest.mark.parametrize("deep", [False, True])
def test_a_picture_of_more_than_4_gb_is_written_as_bigtiff(tmp_path, monkeypatch, deep):
    monkeypatch.setattr(tiff, "CLASSIC_BYTES", 10)
    made = make(300, 400, deep, False, False)
    picture.write(tmp_path / "a.tif", made)
    assert (tmp_path / "a.tif").read_bytes()[:4] == b"II+\0"
    read = picture.read(tmp_path / "a.tif")
    assert np.array_equal(read.rgb, made.rgb) and read.profile == SRGB
    picture.write(tmp_path / "a.png", read)  # the EXIF of a BigTIFF has another form
    assert b"Camera" in picture.read(tmp_path / "a.png").exif


@pytest.mark.parametrize(
    ("name", "layout", "told"),
    [
        ("a.jpg", Layout(9, 9, True, False), "JPEG cannot store transparency; choose png or webp or tif"),
        ("a.jpeg", Layout(9, 9, True, True), "JPEG cannot store transparency; choose png or tif"),
        (
            "a.webp",
            Layout(9, 9, False, True),
            "webp stores 8 bits per channel, but the image has 16; choose png or tif",
        ),
        ("a.webp", Layout(16384, 9, False, False), "at most 16383 px .* 16384x9 px; choose png or jpg or tif"),
        ("a.webp", Layout(16000, 9000, False, False), "at most 134 million pixels .* 16000x9000 px; choose png or jpg"),
        ("a.jpg", Layout(9, 65536, False, False), "at most 65535 px .* 9x65536 px; choose png or tif"),
        ("a.xyz", Layout(9, 9, False, False), "unknown suffix; images are written as .png, .jpg, .webp, .tif"),
    ],
)
def test_a_format_that_cannot_hold_a_picture_names_those_that_can(tmp_path, name, layout, told):
    with pytest.raises(ValueError, match=told):
        formats.check(tmp_path / name, layout)
    formats.check(tmp_path / "a.png", layout)
