"""`teasr upscale` says what is wrong with its results before the first picture is restored, and loses none."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import warm
from conftest import ROOT
from PIL import Image

from teasr import cli
from teasr.imaging import picture
from teasr.restore import batch, outputs

PHOTO = np.ascontiguousarray(skimage.data.coffee()[100:140, 200:256])  # 56 x 40


@pytest.fixture
def upscale(untrained, capsys, monkeypatch):
    """Run `teasr upscale` with these arguments; return the exit code, and what it has said or which files it read."""
    read, original = [], picture.read
    monkeypatch.setattr(picture, "read", lambda path: read.append(path.name) or original(path))

    def run(*arguments):
        read.clear()
        code = cli.main(["upscale", *map(str, arguments), "--model", str(untrained)])
        printed = capsys.readouterr()
        return code, printed.err if code == 2 else printed.out, list(read)

    return run


@pytest.fixture
def pictures(tmp_path):
    """One picture with transparency, one of 16 bits, one plain, and a large one that is only a header."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(PHOTO).convert("RGBA").save(folder / "alpha.png")
    picture.write(folder / "deep.tif", picture.Picture(PHOTO.astype(np.uint16) * 257))
    Image.fromarray(PHOTO).save(folder / "plain.png")
    Image.fromarray(np.zeros((8, 5000, 3), np.uint8)).save(folder / "wide.webp")
    return folder


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("alpha.png", ["-o", "o.jpg"], "JPEG cannot store transparency; choose png or webp or tif"),
        ("deep.tif", ["-o", "o.webp"], "webp stores 8 bits per channel, but the image has 16; choose png or tif"),
        ("deep.tif", ["-o", "out", "--format", "jpg"], "jpg stores 8 bits per channel"),
        ("wide.webp", ["-o", "out"], "webp stores at most 16383 px along a side, but the result has 20000x32 px"),
        ("plain.png", ["-o", "o.xyz"], "o.xyz: unknown suffix; images are written as .png, .jpg, .webp, .tif; for a"),
        ("plain.png", ["-o", "o.bmp"], "o.bmp: unknown suffix"),
        ("plain.png", ["-o", "o.png", "--format", "webp"], "o.png is not of the format webp"),
        ("plain.png", ["-o", "o.png", "--suffix", "_x4"], "make it part of the file name o.png"),
        ("plain.png", ["-o", "out", "--scale", "0.5"], "scale = 0.5: sides must grow by a factor of 1 to 16"),
        ("plain.png", ["-o", "out", "--scale", "2", "--size", "99x99"], "give one of them"),
        ("plain.png", ["-o", "out", "--seed", "-1"], "--seed -1: must be a whole number from 0 to 9223372036854775807"),
        ("plain.png", ["-o", "o.jpg", "--quality", "0"], "--quality 0: must be a whole number from 1 to 100"),
        ("plain.png", ["-o", "out", "--quality", "80"], "--quality 80 is for JPEG and WebP, and no result is one"),
        ("plain.png", ["-o", "out", "--tile", "0"], "--tile 0: must be auto or a number of pixels"),
        ("plain.png", ["-o", "out", "--steps", "\u00b2"], "must be auto or a whole number >= 1"),
        ("plain.png", ["-o", "out", "--suffix", "x" * 300], "a name of more than 255 bytes"),
        ("", ["-o", "o.png"], "o.png is the name of one file, but there are 4 images: give a folder"),
        ("", ["-o", "out", "--format", "jpg"], "JPEG cannot store transparency"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_restored(
    upscale, pictures, monkeypatch, tmp_path, name, more, told
):
    monkeypatch.chdir(tmp_path)
    code, said, read = upscale(pictures / name, *more)
    assert code == 2 and told in said and said.startswith("error: ") and not read
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_a_lower_quality_makes_smaller_files(upscale, pictures, tmp_path, kind):
    sizes = []
    for quality in ("30", "95", None):
        out = tmp_path / f"{quality}.{kind}"
        more = ["--quality", quality] if quality else []
        assert upscale(pictures / "plain.png", "-o", out, *more)[0] == 0
        sizes.append(out.stat().st_size)
    assert sizes[0] < 0.8 * sizes[1] and sizes[1] == sizes[2]  # 95 is the default


def test_a_name_with_a_dot_may_be_a_folder(upscale, pictures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for out in ("results_v1.2", "made.xyz/"):
        assert upscale(pictures / "plain.png", "-o", out)[0] == 0
        assert os.listdir(tmp_path / out) == ["plain.png"]


def test_existing_results_are_neither_replaced_nor_skipped_without_being_asked(upscale, pictures, tmp_path):
    out, source = tmp_path / "out", pictures / "plain.png"
    assert upscale(source, "-o", out)[0] == 0
    made = (out / "plain.png").read_bytes()
    (out / "plain.png").write_bytes(b"mine")
    for target in (out, out / "plain.png"):
        code, said, read = upscale(source, "-o", target)
        assert code == 2 and "1 of 1 results exist already" in said and not read
        assert "--skip-existing" in said and "--overwrite" in said
    assert upscale(pictures, "-o", out)[0] == 2 and os.listdir(out) == ["plain.png"]
    assert "nothing to do" in upscale(source, "-o", out, "--skip-existing")[1]
    assert (out / "plain.png").read_bytes() == b"mine"
    assert upscale(source, "-o", out, "--overwrite")[0] == 0 and (out / "plain.png").read_bytes() == made


def test_no_result_replaces_an_image_that_is_still_to_be_read(upscale, tmp_path):
    """The result of in/a.png would be written over there/a_x4.png, which is restored later."""
    for name in ("in/a.png", "there/a_x4.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(PHOTO).save(tmp_path / name)
    more = ("--suffix", "_x4", "--overwrite")
    code, said, _ = upscale(tmp_path / "in", tmp_path / "there", "-o", tmp_path / "there", *more)
    assert code == 2 and "there/a_x4.png would be overwritten by the result of" in said
    code, said, _ = upscale(tmp_path / "in/a.png", "-o", tmp_path / "in/a.png", "--overwrite")
    assert code == 2 and "would be overwritten by its own result" in said
    (tmp_path / "out/a.png").mkdir(parents=True)
    assert "out/a.png, which is a folder" in upscale(tmp_path / "in/a.png", "-o", tmp_path / "out")[1]


def test_results_inside_the_input_folder_are_no_input_of_the_next_run(upscale, tmp_path, monkeypatch):
    """teasr upscale . -o restored, twice: the second run must not enlarge the results of the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.fromarray(PHOTO).save(tmp_path / name)
    assert upscale(".", "-o", "restored")[0] == 0
    Image.fromarray(PHOTO).save(tmp_path / "c.png")
    code, said, read = upscale(".", "-o", "restored", "--skip-existing")
    assert code == 0 and read == ["c.png"] and said.count("it lies in the output folder") == 2
    made = {path.relative_to(tmp_path / "restored").as_posix() for path in (tmp_path / "restored").rglob("*.png")}
    assert made == {"a.png", "c.png", "sub/b.png"}
    assert upscale(".", "-o", ".", "--suffix", "_x4")[0] == 0  # here they cannot be told apart, and nothing is left out
    assert (tmp_path / "sub/b_x4.png").is_file()


def test_a_log_on_a_full_disk_does_not_end_a_batch(untrained, pictures, tmp_path):
    job = batch.Job(pictures / "plain.png", tmp_path / "out.png")
    full = open("/dev/full", "w")  # noqa: SIM115 - it cannot be closed without an error
    with contextlib.redirect_stdout(full):
        assert batch.run([job], lambda given, *_: given) == 0
    with contextlib.suppress(OSError):
        full.close()
    assert job.target.is_file()


@pytest.mark.parametrize("out", ["/proc/nowhere", "/dev/null/folder", "/proc/self/status/x"])
def test_a_folder_that_cannot_be_written_to_is_an_error_at_once(upscale, pictures, out):
    code, said, read = upscale(pictures / "plain.png", "-o", out)
    assert code == 2 and f"{out}/plain.png cannot be written (" in said and not read


def test_a_full_disk_names_the_path(untrained, pictures, tmp_path, monkeypatch, capsys):
    """/dev/full is a disk that is full: first when the run begins, then while the result is written."""
    real_open = open

    def full(path, mode="r", *rest, **how):
        if "x" in mode:
            return real_open("/dev/full", "wb", *rest, **how)
        return real_open(path, mode, *rest, **how)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match=r"out/plain.png cannot be written \(No space left on device\)"):
        outputs.check_targets([(pictures / "plain.png", tmp_path / "out/plain.png")], False, False)
    with pytest.raises(OSError, match=r"c.png cannot be written \(No space left on device\)"):
        picture.write(tmp_path / "c.png", picture.Picture(PHOTO))
    monkeypatch.setattr(outputs, "check_writable", lambda path: None)
    command = ["upscale", str(pictures / "plain.png"), "-o", str(tmp_path / "out"), "--model", str(untrained)]
    assert cli.main(command) == 1
    assert "out/plain.png cannot be written (No space left on device)" in capsys.readouterr().out


def test_a_result_that_appears_meanwhile_is_kept(untrained, pictures, tmp_path, capsys):
    """Two runs into one folder: the first to finish a picture wins, and the other says so."""
    job = batch.Job(pictures / "plain.png", tmp_path / "out/plain.png")

    def meanwhile(given, *_):
        job.target.write_bytes(b"another's")
        return given

    for skip_existing, failed in ((False, 1), (True, 0)):
        job.target.unlink(missing_ok=True)
        assert batch.run([job], meanwhile, skip_existing) == failed
        assert "was written by another program meanwhile and is kept" in capsys.readouterr().out
        assert job.target.read_bytes() == b"another's" and os.listdir(job.target.parent) == ["plain.png"]
    assert batch.run([job], meanwhile, overwrite=True) == 0
    assert np.array_equal(picture.read(job.target).rgb, PHOTO)


def test_on_a_disk_without_hard_links_results_are_kept_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    picture.write(tmp_path / "a.png", picture.Picture(PHOTO), overwrite=False)
    assert np.array_equal(picture.read(tmp_path / "a.png").rgb, PHOTO)
    with pytest.raises(FileExistsError):
        picture.write(tmp_path / "a.png", picture.Picture(PHOTO), overwrite=False)
    assert os.listdir(tmp_path) == ["a.png"]


WRITING = """
import sys, time
from pathlib import Path
import numpy as np
from teasr.imaging import encoders, picture, tiff
encoders.STRIP_BYTES = tiff.STRIP_BYTES = 1000
noise = np.random.default_rng(0).integers(0, 256, (2000, 100, 3)).astype(np.uint8)
picture.write(Path(sys.argv[1]), picture.Picture(noise), lambda done, of: time.sleep(0.01))
"""


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_kill_9_while_a_result_is_written_leaves_a_stray_that_the_next_run_removes(upscale, tmp_path, suffix):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", WRITING, str(out / f"plain{suffix}")], cwd=ROOT)
    while not any(path.stat().st_size for path in out.glob(".*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (stray,) = out.iterdir()
    assert stray.suffix == ".tmp" and stray.name.startswith(f".plain{suffix}.")
    Image.fromarray(PHOTO).save(tmp_path / f"plain{suffix}")
    assert upscale(tmp_path / f"plain{suffix}", "-o", out)[0] == 0
    assert os.listdir(out) == [f"plain{suffix}"]


def test_two_runs_into_one_folder_leave_whole_files(untrained, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(6):
        Image.fromarray(PHOTO).save(source / f"{i}.png")
    command = [sys.executable, "-m", "teasr.cli", "upscale", str(source), "-o", str(out), "--model", str(untrained)]
    runs = [warm.Popen([*command, "--skip-existing"], cwd=ROOT, stdout=-1, stderr=-1) for _ in range(2)]
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sorted(os.listdir(out)) == [f"{i}.png" for i in range(6)]
    for path in out.iterdir():
        assert picture.read(path).rgb.shape == (160, 224, 3)


def test_headers_tell_what_reading_finds(pictures):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(PHOTO).save(pictures / "turned.jpg", exif=turned)
    Image.fromarray(PHOTO).convert("P").save(pictures / "clear.gif.png", transparency=3)
    for path in sorted(pictures.iterdir()):
        assert picture.layout(path) == picture.read(path).layout
    with pytest.raises(ValueError, match="not an image"):
        picture.layout(_file(pictures / "x.png", b"text"))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        whole = io.BytesIO()
        Image.fromarray(PHOTO).save(whole, "TIFF")
        picture.layout(_file(pictures / "x.tif", whole.getvalue()[:20]))


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
