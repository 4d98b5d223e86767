"""The attacks on `teasr upscale` and `teasr demo`, for bench/attacks.py."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from attack_page import serve_and_attack
from attacks import PATIENCE_S, ROOT, finished, photos, refused, run
from PIL import Image, ImageCms

WRITING = """
import sys, time
from pathlib import Path
import numpy as np
from teasr.imaging import encoders, picture
encoders.STRIP_BYTES = 1000
noise = np.random.default_rng(0).integers(0, 256, (2000, 100, 3)).astype(np.uint8)
picture.write(Path(sys.argv[1]), picture.Picture(noise), lambda done, of: time.sleep(0.01))
"""


def upscale(source: Path, out: object, *more: object) -> subprocess.CompletedProcess:
    """Restore with the small model."""
    return run("teasr", "upscale", source, "-o", out, *more)


def places_that_cannot_be_written(folder: Path) -> str:
    """The output folder lies where nothing can be created, or on a disk that is full."""
    source = photos(folder / "in", 1)
    refused(upscale(source, "/proc/nowhere"), "/proc/nowhere/photo0.png cannot be written")
    done = subprocess.run(
        [sys.executable, "-m", "teasr.cli", "upscale", str(source), "-o", str(folder / "out")], cwd=ROOT, text=True,
        capture_output=True, timeout=PATIENCE_S, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)),
    )  # fmt: skip
    return refused(done, "out/photo0.png cannot be written")


def results_that_their_format_cannot_hold(folder: Path) -> str:
    """Transparency as JPEG, 16 bits as WebP, an unknown suffix, WebP of more than 16383 px."""
    grey = np.zeros((8, 4100), np.uint8)
    Image.fromarray(grey).save(folder / "wide.webp")
    Image.fromarray(grey[:, :8]).convert("LA").save(folder / "clear.png")
    Image.fromarray(grey[:, :8].astype(np.uint16)).save(folder / "deep.png")
    refused(upscale(folder / "clear.png", folder / "o.jpg"), "JPEG cannot store transparency", "png or webp or tif")
    refused(upscale(folder / "deep.png", folder / "o.webp"), "webp stores 8 bits", "png or tif")
    refused(upscale(folder / "clear.png", folder / "o.xyz"), "unknown suffix")
    return refused(upscale(folder / "wide.webp", folder / "out"), "at most 16383 px", "16400x32")


def existing_results(folder: Path) -> str:
    """A result exists, or would replace an image that is still to be read."""
    source = photos(folder / "in", 2)
    (folder / "out").mkdir()
    (folder / "out/photo1.png").write_bytes(b"mine")
    told = refused(upscale(source, folder / "out"), "--skip-existing", "--overwrite")
    assert os.listdir(folder / "out") == ["photo1.png"], "something was restored"
    refused(upscale(source / "photo0.png", source / "photo0.png", "--overwrite"), "its own result")
    finished(upscale(source, folder / "out", "--skip-existing"))
    assert (folder / "out/photo1.png").read_bytes() == b"mine", "a result was replaced"
    return told


def colours_of_lab(folder: Path) -> str:
    """A TIFF in CIELAB with the profile of Lab."""
    lab = ImageCms.createProfile("LAB")
    image = Image.open(photos(folder / "in", 1) / "photo0.png")
    made = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    profile = ImageCms.ImageCmsProfile(lab).tobytes()
    ImageCms.applyTransform(image, made).save(folder / "lab.tif", icc_profile=profile)
    told = finished(upscale(folder / "lab.tif", folder / "o.tif"))
    with Image.open(folder / "o.tif") as result:
        assert result.mode == "RGB" and "icc_profile" not in result.info, "RGB with the profile of Lab"
    return told


def killed_while_a_result_is_written(folder: Path) -> str:
    """kill -9 in the middle of a result; the next run removes what it has left."""
    out = folder / "out"
    process = subprocess.Popen([sys.executable, "-c", WRITING, str(out / "photo0.png")], cwd=ROOT)
    while not any(path.stat().st_size for path in out.glob(".*.tmp")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "photo0.png").exists() and os.listdir(out), "there is a result, or no stray"
    told = finished(upscale(photos(folder / "in", 1), out))
    assert os.listdir(out) == ["photo0.png"], f"left: {os.listdir(out)}"
    return told


def two_runs_into_one_folder(folder: Path) -> str:
    """The same command twice at once: every result is whole, and none is replaced."""
    command = [sys.executable, "-m", "teasr.cli", "upscale", str(photos(folder / "in")), "-o", str(folder / "out")]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=PATIENCE_S)[0] for process in runs]
    for path in (folder / "out").iterdir():
        with Image.open(path) as result:
            result.load()
    made = sum(text.count("128x96 -> 512x384") for text in said)
    kept = sum(text.count("was written by another program meanwhile and is kept") for text in said)
    assert sorted(os.listdir(folder / "out")) == [f"photo{i}.png" for i in range(3)], "results are missing"
    assert made == 3 and all(process.returncode in (0, 1, 2) for process in runs), said
    return f"{made} results were written, {kept} kept"


def hostile_uploads(folder: Path) -> str:
    """200 uploads to the page of `teasr demo`."""
    return serve_and_attack(folder, 200)


RESTORING: list[tuple[str, Callable[[Path], str]]] = [
    ("upscale to where nothing can be written", places_that_cannot_be_written),
    ("upscale to formats that cannot hold it", results_that_their_format_cannot_hold),
    ("upscale over existing results", existing_results),
    ("upscale of a TIFF in CIELAB", colours_of_lab),
    ("upscale killed while it writes", killed_while_a_result_is_written),
    ("upscale twice at once into one folder", two_runs_into_one_folder),
    ("demo under 200 hostile uploads", hostile_uploads),
]
