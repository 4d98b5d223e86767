"""picture.py, batch.py and `teasr upscale`: metadata and alpha are kept, and a broken image does not stop the others.

Output files are never partial.
"""

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import warm
from conftest import ROOT
from PIL import Image, ImageCms

from teasr import cli
from teasr.imaging import picture
from teasr.restore import batch

RNG = np.random.default_rng(0)
PHOTO = np.ascontiguousarray(skimage.data.coffee()[100:140, 200:256])  # 56 x 40
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_eight_bits_with_profile_and_exif_go_round(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera", 6
    Image.fromarray(PHOTO).save(tmp_path / f"a{suffix}", exif=exif, icc_profile=SRGB)
    read = picture.read(tmp_path / f"a{suffix}")
    assert read.rgb.shape == (56, 40, 3) and read.profile == SRGB  # rotated upright
    picture.write(tmp_path / f"b{suffix}", read)
    with Image.open(tmp_path / f"b{suffix}") as again:
        assert again.size == (40, 56) and again.info["icc_profile"] == SRGB
        assert again.getexif()[0x010F] == "Camera" and 0x0112 not in again.getexif()
        if suffix in (".png", ".tif"):
            assert np.array_equal(np.asarray(again), np.rot90(PHOTO, -1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_modes_stay(tmp_path, mode):
    made = Image.fromarray(PHOTO).convert("RGBA" if mode == "RGBA" else "LA" if mode == "LA" else mode)
    if "A" in mode:
        made.putalpha(Image.fromarray(np.tile(np.arange(56, dtype=np.uint8) * 4, (40, 1))))
    made.save(tmp_path / "a.png")
    read = picture.read(tmp_path / "a.png")
    assert (read.alpha is not None) == ("A" in mode) and read.grey == (mode in ("L", "LA", "1"))
    larger = read.restored(np.kron(read.rgb, np.ones((4, 4, 1), np.uint8)))
    picture.write(tmp_path / "b.png", larger)
    with Image.open(tmp_path / "b.png") as again:
        assert again.mode == {"P": "RGB", "1": "L"}.get(mode, mode) and again.size == (224, 160)
        if "A" in mode:
            alpha = np.asarray(again.getchannel("A")).astype(float)
            assert np.abs(alpha[:, 8:-8] - (np.arange(224) / 4 - 0.375)[8:-8] * 4).max() < 2


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_stay(tmp_path, channels, suffix):
    deep = RNG.integers(0, 65536, (24, 32, channels), dtype=np.uint16)
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    cv2.imwrite(str(tmp_path / f"a{suffix}"), deep[..., order])
    read = picture.read(tmp_path / f"a{suffix}")
    assert read.rgb.dtype == np.uint16 and read.grey == (channels == 1)
    picture.write(tmp_path / f"b{suffix}", read)
    again = cv2.imread(str(tmp_path / f"b{suffix}"), cv2.IMREAD_UNCHANGED).reshape(24, 32, channels)
    assert np.array_equal(again[..., order], deep)
    with pytest.raises(ValueError, match="stores 8 bits" if channels < 4 else "cannot store transparency"):
        picture.write(tmp_path / "c.jpg", read)


def test_a_deep_png_keeps_profile_and_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera", 8
    first = picture.Picture(RNG.integers(0, 65536, (24, 32, 3), dtype=np.uint16), profile=SRGB, exif=exif.tobytes())
    picture.write(tmp_path / "a.png", first)
    read = picture.read(tmp_path / "a.png")
    assert np.array_equal(read.rgb, np.rot90(first.rgb)) and read.profile == SRGB and b"Camera" in read.exif
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
        assert opened.getexif()[0x0112] == 8 and opened.info["icc_profile"] == SRGB


def bomb(depth: int) -> bytes:
    """A PNG of a hundred bytes that claims 60000 x 60000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", 60000, 60000, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")


def broken_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(np.roll(PHOTO, i, 0)) for i in range(3)]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(PHOTO).save(folder / "whole.png")
    (folder / "torn.png").write_bytes((folder / "whole.png").read_bytes()[:900])
    (folder / "whole.png").unlink()
    (folder / "text.jpg").write_text("no picture")
    (folder / "bomb.png").write_bytes(bomb(8))
    (folder / "deep_bomb.png").write_bytes(bomb(16))
    (folder / "empty.tif").write_bytes(b"")


def test_what_is_refused_is_named(tmp_path):
    broken_files(tmp_path)
    messages = {
        "animated.webp": "animated",
        "torn.png": "cannot be read",
        "text.jpg": "not an image in a supported format",
    }
    messages |= {
        "bomb.png": "exceeds (the )?limit",
        "deep_bomb.png": "exceeds (the )?limit",
        "empty.tif": "not an image",
    }
    assert {p.name for p in tmp_path.iterdir()} == set(messages)
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message) as caught:
            picture.read(tmp_path / name)
        assert name in str(caught.value)


def test_a_folder_with_broken_files_is_restored_but_for_them(untrained, tmp_path, capsys):
    """Sub-folders are kept, the exit code is 1, and a second start with --skip-existing only does what is missing."""
    source, out = tmp_path / "in", tmp_path / "out"
    broken_files(source / "broken")
    Image.fromarray(PHOTO).save(source / "a.png")
    (source / "sub").mkdir()
    Image.fromarray(PHOTO).convert("L").save(source / "sub/b.jpeg")
    Image.fromarray(PHOTO).save(source / "sub/c.bmp")
    command = ["upscale", str(source), "-o", str(out), "--model", str(untrained), "--suffix", "_x4"]
    assert cli.main(command) == 1
    printed = capsys.readouterr()
    assert "6 of 9 images failed" in printed.err and printed.out.count("failed: ") == 6
    assert "1/9 " in printed.out and "56x40 -> 224x160" in printed.out and "torn.png: failed: " in printed.out
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {"a_x4.png", "sub/b_x4.jpeg", "sub/c_x4.png"}
    with Image.open(out / "sub/b_x4.jpeg") as grey:
        assert grey.mode == "L" and grey.size == (224, 160)
    before = {name: (out / name).stat().st_mtime_ns for name in files}
    (out / "a_x4.png").unlink()
    assert cli.main([*command, "--skip-existing"]) == 1
    assert capsys.readouterr().out.count("already exists") == 2
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items() if name != "a_x4.png")
    assert (out / "a_x4.png").is_file()


def test_one_file_globs_and_mistakes(untrained, tmp_path, capsys):
    for name in ("a.png", "b.png", "b.tif"):
        Image.fromarray(PHOTO).save(tmp_path / name)
    m = ["--model", str(untrained)]
    assert cli.main(["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "one.webp"), *m]) == 0
    with Image.open(tmp_path / "one.webp") as made:
        assert made.format == "WEBP" and made.size == (224, 160)
    assert cli.main(["upscale", f"{tmp_path}/*.png", "-o", str(tmp_path / "out"), *m]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "b.png"}
    capsys.readouterr()
    mistakes = {
        (str(tmp_path), "-o", str(tmp_path)): "would be overwritten by its own result",
        (str(tmp_path / "b.*"), "-o", str(tmp_path / "out"), "--format", "png"): "would both be written to",
        ("/nowhere", "-o", "x"): "/nowhere is not an image",
        (str(tmp_path / "a.png"), "-o", "x", "--steps", "0"): "--steps 0: must be auto or a whole number >= 1",
        (str(tmp_path / "a.png"), "-o", "x", "--tile", "big"): "--tile big: must be auto or a number",
        (str(tmp_path / "a.png"), "-o", "x", "--dtype", "nf4"): "dtype nf4: backbone tiny supports fp32, bf16, fp16",
        (str(tmp_path / "a.png"), "-o", "x", "--fidelity", "0.5"): "use 2 steps or more",
        (str(tmp_path / "a.png"), "-o", "x", "--offload"): "no GPU is visible",
    }
    for arguments, message in mistakes.items():
        assert cli.main(["upscale", *arguments, *m]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["upscale", str(tmp_path / "a.png"), "-o", "x", "--model", str(tmp_path)]) == 2
    assert "neither a checkpoint nor a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_at_any_moment_no_half_written_file_is_left(untrained, tmp_path, number):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(60):
        Image.fromarray(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(source / f"{i:02d}.png")
    command = [sys.executable, "-m", "teasr.cli", "upscale", str(source), "-o", str(out), "--model", str(untrained)]
    process = warm.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 900
    while len(list(out.glob("*.png"))) < 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and b"Traceback" not in err
    made = sorted(out.glob("*.png"))
    assert 2 <= len(made) < 60
    for path in made:
        assert picture.read(path).rgb.shape == (192, 256, 3)
    assert cli.main([*command[3:], "--skip-existing"]) == 0
    assert len(list(out.glob("*.png"))) == 60


def test_jobs_of_a_tree(tmp_path):
    for name in ("a/x.png", "a/b/y.jpg", "a/b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = batch.jobs([str(tmp_path / "a")], tmp_path / "out", kind="webp")
    assert [j.target.relative_to(tmp_path).as_posix() for j in found] == ["out/b/y.webp", "out/x.webp"]


@pytest.mark.parametrize("act", [picture.read, picture.layout])
def test_a_tiff_with_too_many_tags_is_refused_by_name(act, tmp_path):
    """Pillow then reads pixels as tags, and raises TypeError."""
    path = tmp_path / "broken.tif"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[8] = 255  # number of tags
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"broken.tif (cannot be read as an image|is not an image)"):
        act(path)
