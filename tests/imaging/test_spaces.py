"""spaces.py, tiff.py, deep.py: colours of CIELAB, CMYK, YCbCr, grey and palette files, and what their profiles say."""

import io

import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, ImageCms

from teasr.imaging import picture, spaces

PHOTO = np.ascontiguousarray(skimage.data.coffee()[100:140, 200:256])  # 56 x 40
DEEP = PHOTO.astype(np.uint16) * 257 + 11
ALPHA = np.tile(np.arange(56, dtype=np.uint16) * 1191, (40, 1))
SRGB, LAB = (ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes() for name in ("sRGB", "LAB"))


def lab_of(photo: np.ndarray) -> Image.Image:
    """The photograph in CIELAB, by LittleCMS."""
    made = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(Image.fromarray(photo), made)


def grey_profile(gamma: int) -> bytes:
    """A profile of the space GRAY, made from that of sRGB: its first curve, whose exponent is replaced."""
    curve = b"curv" + bytes(4) + (1).to_bytes(4) + (gamma * 256).to_bytes(2) + bytes(2)
    white = b"XYZ " + bytes(4) + b"".join(round(x * 65536).to_bytes(4) for x in (0.9642, 1.0, 0.8249))
    at = 128 + 4 + 2 * 12
    tags = b"".join((b"kTRC", at.to_bytes(4), len(curve).to_bytes(4)))
    tags += b"".join((b"wtpt", (at + len(curve)).to_bytes(4), len(white).to_bytes(4)))
    body = (2).to_bytes(4) + tags + curve + white
    return (128 + len(body)).to_bytes(4) + SRGB[4:16] + b"GRAYXYZ " + SRGB[24:128] + body


def round_trip(tmp_path, suffix=".tif"):
    """Read a.tif, write it as another file, and return both pictures."""
    read = picture.read(tmp_path / "a.tif")
    assert picture.layout(tmp_path / "a.tif") == read.layout
    picture.write(tmp_path / f"b{suffix}", read)
    return read, picture.read(tmp_path / f"b{suffix}")


@pytest.mark.parametrize("kind", ["pillow", "cielab", "icclab"])
@pytest.mark.parametrize("bits", [8, 16])
def test_cielab_becomes_srgb_without_the_profile_of_lab(tmp_path, kind, bits):
    lab = lab_of(PHOTO)
    with io.BytesIO() as file:
        lab.save(file, "TIFF")
        file.seek(0)
        stored = tifffile.imread(file)  # L*, and a* and b* as two's complements
    if kind == "icclab":
        stored = np.dstack((stored[..., :1], stored[..., 1:] ^ 0x80))
    if bits == 16:
        unit = 257 if kind != "icclab" else 256
        stored = np.dstack((stored[..., :1].astype(np.uint16) * unit, stored[..., 1:].astype(np.uint16) << 8))
    if kind == "pillow" and bits == 8:
        lab.save(tmp_path / "a.tif", icc_profile=LAB)
    else:
        space = "icclab" if kind == "icclab" else "cielab"
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric=space, iccprofile=LAB)
    read, again = round_trip(tmp_path)
    scale = 257 if bits == 16 else 1
    assert read.rgb.dtype == (np.uint16 if bits == 16 else np.uint8)
    assert np.abs(read.rgb / scale - PHOTO).max() <= 3
    assert read.profile is None and again.profile is None and np.array_equal(read.rgb, again.rgb)


@pytest.mark.parametrize("bits", [8, 16])
def test_cmyk_becomes_srgb_without_its_profile(tmp_path, bits):
    inks = np.dstack((255 - PHOTO, np.zeros((40, 56), np.uint8)))
    stored = inks.astype(np.uint16) * 257 if bits == 16 else inks
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="separated", iccprofile=SRGB)
    read, again = round_trip(tmp_path)
    assert np.array_equal(read.rgb, PHOTO) and read.profile is None and again.profile is None


@pytest.mark.parametrize("how", [{"compression": "jpeg"}, {}])
def test_ycbcr_becomes_rgb(tmp_path, how):
    if how:
        Image.fromarray(PHOTO).save(tmp_path / "a.tif", **how, quality=95)
    else:
        tifffile.imwrite(
            tmp_path / "a.tif", np.asarray(Image.fromarray(PHOTO).convert("YCbCr")), photometric="ycbcr",
            subsampling=(1, 1), iccprofile=SRGB,
        )  # fmt: skip
    read, _ = round_trip(tmp_path)
    assert np.abs(read.rgb.astype(int) - PHOTO).mean() < 3 and (read.profile == SRGB) == (not how)


@pytest.mark.parametrize("mode", ["P", "YCbCr", "HSV", "LAB", "CMYK"])
def test_pillow_images_of_any_colour_space_become_rgb(mode):
    image = lab_of(PHOTO) if mode == "LAB" else Image.fromarray(PHOTO).convert(mode)
    image.info["icc_profile"] = LAB if mode == "LAB" else SRGB
    made = picture.from_pil(image)
    assert np.abs(made.rgb.astype(int) - PHOTO).mean() < 20
    assert made.profile == (None if mode in ("LAB", "CMYK") else SRGB)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("alpha", [False, True])
def test_grey_with_a_grey_profile_keeps_it_and_webp_which_is_rgb_gets_the_colours(tmp_path, suffix, alpha):
    if suffix == ".jpg" and alpha:
        return
    profile, grey = grey_profile(1), Image.fromarray(PHOTO[..., 0])
    assert spaces.space_of(profile) == "GRAY"
    if alpha:
        grey.putalpha(Image.fromarray((ALPHA >> 8).astype(np.uint8)))
    grey.save(tmp_path / "a.tif", icc_profile=profile)
    read, again = round_trip(tmp_path, suffix)
    assert read.grey and read.profile == profile
    if suffix == ".webp":
        shown = 255 * np.where((x := read.rgb / 255) <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
        seen = again.alpha > 200 if alpha else np.ones((40, 56), bool)
        assert again.profile is None and np.abs(again.rgb - shown)[seen].mean() < 4
    else:
        assert again.grey and again.profile == profile


def test_grey_with_a_profile_of_rgb_is_plain_grey_or_becomes_rgb():
    """Grey files may not carry a profile of RGB. That of sRGB says nothing new; the colours of others would change."""
    other = SRGB.replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be")).replace(b"sRGB", b"wide")
    for profile, wanted in ((SRGB, (None, True)), (other, (other, False)), (LAB, (None, True)), (b"no", (None, True))):
        image = Image.fromarray(PHOTO[..., 0])
        image.info["icc_profile"] = profile
        made = picture.from_pil(image)
        assert (made.profile, made.grey) == wanted


def test_a_palette_with_a_profile_keeps_it(tmp_path):
    Image.fromarray(PHOTO).quantize(32).save(tmp_path / "a.tif", icc_profile=SRGB)
    read, again = round_trip(tmp_path)
    assert read.profile == again.profile == SRGB and not read.grey


@pytest.mark.parametrize(
    ("name", "stored", "how", "wanted"),
    [
        ("channels in separate planes", DEEP.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": 2}, DEEP),
        ("white is zero", 65535 - DEEP[..., 0], {"photometric": "miniswhite"}, DEEP[..., :1]),
        ("big-endian", DEEP, {"photometric": "rgb", "byteorder": ">"}, DEEP),
        ("BigTIFF", DEEP, {"photometric": "rgb", "bigtiff": True}, DEEP),
        ("tiles", DEEP, {"photometric": "rgb", "tile": (16, 16)}, DEEP),
        ("fourth channel", np.dstack((DEEP, ALPHA)), {"photometric": "rgb", "extrasamples": [0]}, DEEP),
        ("alpha", np.dstack((DEEP, ALPHA)), {"photometric": "rgb", "extrasamples": [2]}, np.dstack((DEEP, ALPHA))),
    ],
)
def test_tiffs_of_16_bits_are_read_as_they_are_meant(tmp_path, name, stored, how, wanted):
    tifffile.imwrite(tmp_path / "a.tif", stored, iccprofile=SRGB if wanted.shape[2] > 1 else None, **how)
    read, again = round_trip(tmp_path, ".png")
    assert np.array_equal(read.channels(), wanted) and np.array_equal(again.channels(), wanted)
    assert read.profile == again.profile == (SRGB if wanted.shape[2] > 1 else None)


def test_colours_multiplied_by_alpha_are_divided_again(tmp_path):
    multiplied = np.rint(DEEP * (ALPHA[..., None] / 65535)).astype(np.uint16)
    stored = np.dstack((multiplied, ALPHA))
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    read, _ = round_trip(tmp_path)
    assert np.abs(read.rgb[:, 10:].astype(int) - DEEP[:, 10:]).max() <= 4 and np.array_equal(read.alpha, ALPHA)


def test_what_a_16_bit_tiff_cannot_be_read_as_is_said(tmp_path):
    two = np.dstack((DEEP[..., 0], ALPHA))
    tifffile.imwrite(tmp_path / "a.tif", two, photometric="minisblack", extrasamples=["unassalpha"])
    with pytest.raises(ValueError, match="a TIFF of 2 channels with 16 bits each; save it as RGBA or as PNG"):
        picture.read(tmp_path / "a.tif")
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        for _ in range(2):
            file.write(DEEP, photometric="rgb")
    with pytest.raises(ValueError, match="several pages"):
        picture.read(tmp_path / "b.tif")


def test_a_deep_grey_png_keeps_its_alpha_and_its_transparent_level(tmp_path):
    made = picture.Picture(np.repeat(DEEP[..., :1], 3, 2), ALPHA, grey=True)
    picture.write(tmp_path / "a.png", made)
    read = picture.read(tmp_path / "a.png")
    assert read.grey and np.array_equal(read.channels(), made.channels())
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "b.png", transparency=int(DEEP[3, 4, 0]))
    read = picture.read(tmp_path / "b.png")
    assert np.array_equal(read.alpha == 0, DEEP[..., 0] == DEEP[3, 4, 0])
    assert picture.layout(tmp_path / "b.png") == read.layout
